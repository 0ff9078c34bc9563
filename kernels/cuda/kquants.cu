#include "kquants.cuh"
#include "launch.cuh"
#include "table.h"

const qf_kernel kquants_kernels[] = {QF_FAMILY("q4_k", Q4_K), QF_FAMILY("q5_k", Q5_K), QF_FAMILY("q6_k", Q6_K), {}};
