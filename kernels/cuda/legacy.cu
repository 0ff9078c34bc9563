#include "launch.cuh"
#include "legacy.cuh"
#include "table.h"

const qf_kernel legacy_kernels[] = {QF_FAMILY("q4_0", Q4_0), QF_FAMILY("q4_1", Q4_1), QF_FAMILY("q8_0", Q8_0), {}};
