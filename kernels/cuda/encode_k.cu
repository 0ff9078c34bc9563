// Encode and decode of K-quants.
#include "encode.cuh"

namespace {
#include "../cpu/fit.inc"
#include "../cpu/kquants.inc"
}  // namespace

extern const qf_kernel encode_k_kernels[];
const qf_kernel encode_k_kernels[] = {KQUANT_KERNELS {}};
