// Encode and decode of the types with one scale per block: legacy, ternary and MXFP4.
#include "encode.cuh"

namespace {
#include "../cpu/fit.inc"
#include "../cpu/legacy.inc"
#include "../cpu/ternary.inc"
#include "../cpu/fp4.inc"
}  // namespace

extern const qf_kernel encode_legacy_kernels[];
const qf_kernel encode_legacy_kernels[] = {LEGACY_KERNELS TERNARY_KERNELS FP4_KERNELS {}};
