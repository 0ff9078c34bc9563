#include "integers.cuh"
#include "launch.cuh"
#include "table.h"

const qf_kernel int8_kernels[] = {INTEGERS(8), INT8_ROW, {}};
