// What CUDA reports as one of our return codes.
#pragma once
#include <cuda_runtime.h>

#include "../quantforge.h"

// Taken off the thread's record too, so that no later launch is blamed for it.
static inline int status(cudaError_t error) {
    if (error == cudaSuccess) return QF_OK;
    cudaGetLastError();
    return QF_EDEVICE | (int)error << 8;
}
