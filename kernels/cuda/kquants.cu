#include "kquants.cuh"
#include "launch.cuh"
#include "table.h"

const qf_kernel kquants_kernels[] = {KQUANT_FAMILIES, {}};
