// Four lanes.
#if defined(__aarch64__)
#include <arm_neon.h>
#include "common.h"

namespace {
#include "vec_neon.h"
#include "kernels.inc"
}  // namespace

extern const qf_table qf_table_neon;
const qf_table qf_table_neon = {QF_ABI, (int32_t)(sizeof kernels / sizeof *kernels), "neon", kernels};
#endif
