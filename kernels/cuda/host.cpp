// The kernels' decode and dot on the host, for the tests: a warp is a loop over 32 lanes.
// The same table as _cuda.so, on CPU arrays.
#include "fp8.cuh"
#include "integers.cuh"
#include "kquants.cuh"
#include "launch.cuh"
#include "legacy.cuh"
#include "lookup.cuh"
#include "ternary.cuh"

const qf_kernel kernels[] = {
    LEGACY_FAMILIES, TERNARY_FAMILIES, KQUANT_FAMILIES, INTEGERS(4), INTEGERS(8), INT8_ROW, FP8_FAMILIES,
    LOOKUP_FAMILIES, CODEBOOK_FAMILIES,
};
const qf_table table = {QF_ABI, (int32_t)(sizeof kernels / sizeof *kernels), "host", kernels};

const qf_table *qf_open(const char *) { return &table; }
const char *qf_isa(int i) { return i ? nullptr : "host"; }
