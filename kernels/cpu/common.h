// What every unit shares: standard headers, bit casts, float conversions. No std templates and
// internal linkage throughout: a unit is compiled for its own instruction set, and a shared inline
// function compiled for AVX-512 must never be the one that the linker keeps for the scalar unit.
#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../quantforge.h"

// What stands between these is compiled for an instruction set; for clang, one does not stand in another.
#define QF_PRAGMA(...) _Pragma(#__VA_ARGS__)
#if defined(__clang__)
#define QF_TARGET(isa) QF_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define QF_TARGET_END QF_PRAGMA(clang attribute pop)
#else
#define QF_TARGET(isa) QF_PRAGMA(GCC push_options) QF_PRAGMA(GCC target(isa))
#define QF_TARGET_END QF_PRAGMA(GCC pop_options)
#endif

// The same algorithms are compiled for GPUs, where kernels/cuda/encode.cuh defines these.
#ifndef QF_INLINE
#define QF_INLINE static inline __attribute__((always_inline))
#define QF_FN inline                              // what kernels call
#define QF_BODY                                   // lambdas that kernels call
#define QF_MEMBER
#define QF_TABLE alignas(64) const
#define QF_UNROLL _Pragma("GCC unroll 8")         // loops over a group's weights: on a GPU these are registers
#define QF_UNROLL_GPU
#define QF_NO_UNROLL_GPU
#endif

QF_INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
QF_INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

// IEEE half from float, round to nearest even, as F16C and ggml do it (NaN stays a quiet NaN).
QF_INLINE uint16_t half_of(float x) {
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);             // rounds to >= 65520: infinity
    if (a < 0x38800000u) {                                               // subnormal half: let the FPU round
        const float r = float_of(a) + 0.5f;                              // ulp(0.5) == 2^-24 == the least half
        return (uint16_t)(sign | (bits_of(r) - 0x3f000000u));
    }
    const uint32_t r = a + 0xfffu + ((a >> 13) & 1u);
    return (uint16_t)(sign | ((r - 0x38000000u) >> 13));
}

QF_INLINE float float_of_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, e = (h >> 10) & 31u, m = h & 0x3ffu;
    if (e == 31) return float_of(sign | 0x7f800000u | (m << 13));
    if (e == 0) {
        const float r = (float)m * 5.9604644775390625e-8f;               // 2^-24, exact
        return float_of(sign | bits_of(r));
    }
    return float_of(sign | ((e + 112u) << 23) | (m << 13));
}
