// Eight lanes.
#if defined(__x86_64__)
#include <immintrin.h>
#include "common.h"
QF_TARGET("avx2,fma,f16c")

namespace {
#include "vec_avx2.h"
#include "kernels.inc"
}  // namespace

extern const qf_table qf_table_avx2;
const qf_table qf_table_avx2 = {QF_ABI, (int32_t)(sizeof kernels / sizeof *kernels), "avx2", kernels};

QF_TARGET_END
#endif
