#include "integers.cuh"
#include "launch.cuh"
#include "table.h"

const qf_kernel int4_kernels[] = {INTEGERS(4), {}};
