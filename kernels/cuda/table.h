// The kernels of each unit; an empty entry ends them.
#pragma once
#include "../quantforge.h"

extern const qf_kernel legacy_kernels[], kquants_kernels[], int4_kernels[], int8_kernels[], fp8_kernels[], lookup_kernels[],
    codebook_kernels[];
extern const qf_kernel encode_k_kernels[], encode_legacy_kernels[], encode_iq_kernels[], feedback_kernels[];
