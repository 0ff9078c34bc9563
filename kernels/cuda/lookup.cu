#include "launch.cuh"
#include "lookup.cuh"
#include "table.h"

const qf_kernel lookup_kernels[] = {LOOKUP_FAMILIES, {}};
