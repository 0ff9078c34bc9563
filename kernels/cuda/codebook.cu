#include "launch.cuh"
#include "lookup.cuh"
#include "table.h"

const qf_kernel codebook_kernels[] = {CODEBOOK_FAMILIES, {}};
