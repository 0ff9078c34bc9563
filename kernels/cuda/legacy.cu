#include "launch.cuh"
#include "legacy.cuh"
#include "table.h"

const qf_kernel legacy_kernels[] = {LEGACY_FAMILIES, {}};
