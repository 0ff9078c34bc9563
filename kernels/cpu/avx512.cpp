// Sixteen lanes.
#if defined(__x86_64__)
#include <immintrin.h>
#include "common.h"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace {
#include "vec_avx512.h"
#include "kernels.inc"
}  // namespace

extern const qf_table qf_table_avx512;
const qf_table qf_table_avx512 = {QF_ABI, (int32_t)(sizeof kernels / sizeof *kernels), "avx512", kernels};

#pragma GCC pop_options
#endif
