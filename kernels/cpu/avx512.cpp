// Sixteen lanes.
#if defined(__x86_64__)
#include <immintrin.h>
#include "common.h"
#define QF_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#define QF_AVX512_VNNI "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512vnni,bmi2"
QF_TARGET(QF_AVX512)

namespace {
#include "vec_avx512.h"
#include "kernels.inc"
}  // namespace

extern const qf_table qf_table_avx512;
const qf_table qf_table_avx512 = {QF_ABI, (int32_t)(sizeof kernels / sizeof *kernels), "avx512", kernels};

QF_TARGET_END
#endif
