#include "fp8.cuh"
#include "launch.cuh"
#include "table.h"

const qf_kernel fp8_kernels[] = {FP8_FAMILIES, {}};
