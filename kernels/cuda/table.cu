// The one table of _cuda.so.
#include "table.h"

#include <string.h>

namespace {

const qf_kernel *const units[] = {
    legacy_kernels, kquants_kernels, int4_kernels, int8_kernels, fp8_kernels, lookup_kernels, codebook_kernels, encode_k_kernels, encode_legacy_kernels,
    encode_iq_kernels, feedback_kernels,
};
constexpr int ROOM = 256;

struct Joined {
    qf_kernel kernels[ROOM];
    qf_table  table;
    Joined() : kernels(), table() {
        int n = 0;
        for (const qf_kernel *unit : units)
            for (; unit->fn && n < ROOM; unit++) kernels[n++] = *unit;
        table.abi = QF_ABI, table.n = n, table.isa = "cuda", table.kernels = kernels;
    }
};

}  // namespace

const qf_table *qf_open(const char *isa) {
    static const Joined joined;
    return !isa || !strcmp(isa, "cuda") ? &joined.table : nullptr;
}

const char *qf_isa(int i) { return i ? nullptr : "cuda"; }
