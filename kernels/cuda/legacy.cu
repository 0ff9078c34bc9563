#include "launch.cuh"
#include "legacy.cuh"
#include "table.h"
#include "ternary.cuh"

const qf_kernel legacy_kernels[] = {LEGACY_FAMILIES, TERNARY_FAMILIES, {}};
