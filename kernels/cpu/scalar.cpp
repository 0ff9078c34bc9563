// One lane: the specification.
#include "common.h"

namespace {
#include "vec_scalar.h"
#include "kernels.inc"
}  // namespace

extern const qf_table qf_table_scalar;
const qf_table qf_table_scalar = {QF_ABI, (int32_t)(sizeof kernels / sizeof *kernels), "scalar", kernels};

