// Encode and decode of the IQ types.
#include "encode.cuh"

namespace {
#include "../cpu/iquants.inc"
}  // namespace

extern const qf_kernel encode_iq_kernels[];
const qf_kernel encode_iq_kernels[] = {IQ_KERNELS {}};
