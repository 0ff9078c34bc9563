// Which units this CPU can run, best first.
#include "common.h"

extern const qf_table qf_table_scalar;
#if defined(__x86_64__)
extern const qf_table qf_table_avx2, qf_table_avx512;
#endif
#if defined(__aarch64__)
extern const qf_table qf_table_neon;
#endif

namespace {

bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }  // and F16C, which all have
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2");
}
#endif

struct Unit {
    const qf_table *table;
    bool (*runs_here)();
};

const Unit units[] = {
#if defined(__x86_64__)
    {&qf_table_avx512, has_avx512},
    {&qf_table_avx2, has_avx2},
#endif
#if defined(__aarch64__)
    {&qf_table_neon, always},
#endif
    {&qf_table_scalar, always},
};

}  // namespace

const qf_table *qf_open(const char *isa) {
    for (const Unit &u : units)
        if (u.runs_here() && (!isa || !strcmp(isa, u.table->isa))) return u.table;
    return nullptr;
}

const char *qf_isa(int i) {
    for (const Unit &u : units)
        if (u.runs_here() && i-- == 0) return u.table->isa;
    return nullptr;
}
