// What device code and its test on the host share: bit operations that the GPU has as one
// instruction, and the two 16-bit floats as raw bits. Compiled by nvcc, and by g++ for the tests.
#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define QF_HD static __host__ __device__ __forceinline__
#define QF_MEMBER __host__ __device__ __forceinline__
#define QF_WARP static __device__ __forceinline__
#define QF_UNROLL _Pragma("unroll")
#else
#define QF_HD static inline __attribute__((always_inline))
#define QF_MEMBER inline __attribute__((always_inline))
#define QF_WARP static inline
#define QF_UNROLL
#endif

QF_HD uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
QF_HD float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

// Never contracted: dequantized numbers are those of the CPU, bit by bit.
#ifdef __CUDA_ARCH__
QF_HD float mul(float a, float b) { return __fmul_rn(a, b); }
QF_HD float sub(float a, float b) { return __fsub_rn(a, b); }
QF_HD float add(float a, float b) { return __fadd_rn(a, b); }
QF_HD float divide(float a, float b) { return __fdiv_rn(a, b); }
QF_HD float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#else
QF_HD float mul(float a, float b) { return a * b; }
QF_HD float sub(float a, float b) { return a - b; }
QF_HD float add(float a, float b) { return a + b; }
QF_HD float divide(float a, float b) { return a / b; }
QF_HD float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#endif

// IEEE half in the low 16 bits -> float.
QF_HD float float_of_half(uint32_t h) {
#ifdef __CUDA_ARCH__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((uint16_t)h));
    return x;
#else
    const uint32_t sign = (h & 0x8000u) << 16, e = h >> 10 & 31u, m = h & 0x3ffu;
    if (e == 31) return float_of(sign | 0x7f800000u | m << 13);
    if (e == 0) return float_of(sign | bits_of((float)m * 5.9604644775390625e-8f));  // 2^-24
    return float_of(sign | (e + 112u) << 23 | m << 13);
#endif
}

constexpr uint16_t NAN16 = 0x7fff;  // what the GPU makes of any NaN, in either format

QF_HD uint16_t half_of(float x) {
#ifdef __CUDA_ARCH__
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
#else
    const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    if (x != x) return NAN16;
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
    if (a < 0x38800000u) return (uint16_t)(sign | (bits_of(float_of(a) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((a + 0xfffu + (a >> 13 & 1u) - 0x38000000u) >> 13));
#endif
}

QF_HD float float_of_bf16(uint32_t h) { return float_of(h << 16); }

QF_HD uint16_t bf16_of(float x) {
#ifdef __CUDA_ARCH__
    uint16_t h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
#else
    const uint32_t u = bits_of(x);
    if (x != x) return NAN16;
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
#endif
}

// Bytes of {b, a} (a the low word) chosen by the four nibbles of s; s's eighths bit is not used here.
QF_HD uint32_t prmt(uint32_t a, uint32_t b, uint32_t s) {
#ifdef __CUDA_ARCH__
    return __byte_perm(a, b, s);
#else
    const uint64_t both = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) r |= (uint32_t)(both >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
    return r;
#endif
}

// (a & mask) | c. Left to itself the compiler takes two instructions.
QF_HD uint32_t and_or(uint32_t a, uint32_t mask, uint32_t c) {
#ifdef __CUDA_ARCH__
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(a), "r"(mask), "r"(c));
    return r;
#else
    return (a & mask) | c;
#endif
}

// c, of which the compiler does not know that it is constant (no lane's number has bits 5 to 8), nor that it is the same for
// i = 0 .. 3: kept in a register. Left to itself ptxas makes a constant anew for every use: as the immediate of a permutation,
// whose selector it then loads, or as four moves for the four registers of a tensor core's operand.
QF_HD uint32_t opaque(uint32_t c, [[maybe_unused]] int i = 0) {
#ifdef __CUDA_ARCH__
    return c + (threadIdx.x & (32u << i));
#else
    return c;
#endif
}

// Two numbers in one word, the first in the low half. Arithmetic on both: a packed multiply-add, rounded once.
template <class T>
struct Pairs {
    static constexpr uint32_t SIGNS = 0x80008000u;
    QF_HD uint32_t plus(uint32_t a, uint32_t b) { return T::fma(a, T::ONE, b); }
    QF_HD uint32_t minus(uint32_t a, uint32_t b) { return T::fma(b, T::ONE ^ SIGNS, a); }
    QF_HD uint32_t times(uint32_t a, uint32_t b) { return T::fma(a, b, SIGNS); }  // and −0
#ifndef __CUDA_ARCH__
    QF_HD uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
        return (uint32_t)T::of(fma_(T::low(a), T::low(b), T::low(c))) | (uint32_t)T::of(fma_(T::high(a), T::high(b), T::high(c))) << 16;
    }
#endif
};

struct Bf16 : Pairs<Bf16> {
    static constexpr uint32_t MAGIC = 0x43004300u;  // an integer below 128 in the lowest bits of a half: 128 + it
    static constexpr float RAISE = 128;
    static constexpr uint32_t ONE = 0x3f803f80u;
    QF_HD float low(uint32_t w) { return float_of(w << 16); }
    QF_HD float high(uint32_t w) { return float_of(w & 0xffff0000u); }
    QF_HD uint16_t of(float x) { return bf16_of(x); }
    QF_HD uint32_t pair(float x) { return bits_of(x) >> 16 | (bits_of(x) & 0xffff0000u); }  // x is a bf16
#ifdef __CUDA_ARCH__
    QF_HD uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
        uint32_t d;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
        return d;
    }
#endif
};

struct F16 : Pairs<F16> {
    static constexpr uint32_t MAGIC = 0x64006400u;  // an integer below 1024: 1024 + it
    static constexpr float RAISE = 1024;
    static constexpr uint32_t ONE = 0x3c003c00u;
    QF_HD float low(uint32_t w) { return float_of_half(w & 0xffffu); }
    QF_HD float high(uint32_t w) { return float_of_half(w >> 16); }
    QF_HD uint16_t of(float x) { return half_of(x); }
    QF_HD uint32_t pair(float x) { return half_of(x) * 0x10001u; }
#ifdef __CUDA_ARCH__
    QF_HD uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
        uint32_t d;
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
        return d;
    }
#endif
};

// p, if it is a multiple of `size`: a GPU faults on the address of a vector that is not, and so does the host, for the tests.
QF_HD const void *on_boundary(const void *p, [[maybe_unused]] uintptr_t size) {
#ifndef __CUDA_ARCH__
    if ((uintptr_t)p % size) __builtin_trap();
#endif
    return p;
}

// Weights are read once: they pass by the L1, which stays free for activations. p is a multiple of N bytes.
template <int N>
QF_HD void load_once(const uint8_t *p, uint32_t *w) {
#ifdef __CUDA_ARCH__
    static_assert(N == 1 || N == 2 || N == 4 || N == 8 || N == 16, "one load");
    if constexpr (N == 16)
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
    else if constexpr (N == 8)
        asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
    else if constexpr (N == 4)
        asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(w[0]) : "l"(p));
    else if constexpr (N == 1)
        asm volatile("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=r"(w[0]) : "l"(p));
    else
        asm volatile("{.reg .u16 h; ld.global.nc.L1::no_allocate.u16 h, [%1]; cvt.u32.u16 %0, h;}" : "=r"(w[0]) : "l"(p));
#else
    w[0] = 0;
    memcpy(w, on_boundary(p, N), N);
#endif
}

// No load moves across.
QF_HD void keep_order() {
#ifdef __CUDA_ARCH__
    asm volatile("" ::: "memory");
#endif
}

// From here on nobody knows where p came from: what is read through it is not read before.
template <class P>
QF_HD void hide(P *&p) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+l"(p)::"memory");
#else
    (void)p;
#endif
}

// N words at once; p is a multiple of their bytes.
template <int N>
QF_HD void load_words(const void *p, uint32_t *w) {
#ifdef __CUDA_ARCH__
    static_assert(N == 1 || N == 2 || N == 4, "one load");
    if constexpr (N == 1) {
        w[0] = *(const uint32_t *)p;
    } else if constexpr (N == 4) {
        const uint4 v = *(const uint4 *)p;
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else {
        const uint2 v = *(const uint2 *)p;
        w[0] = v.x, w[1] = v.y;
    }
#else
    memcpy(w, on_boundary(p, 4 * N), 4 * N);
#endif
}

template <int N>
QF_HD void store_words(void *p, const uint32_t *w) {
#ifdef __CUDA_ARCH__
    if constexpr (N == 2) *(uint2 *)p = make_uint2(w[0], w[1]);
    else
        for (int i = 0; i < N; i += 4) ((uint4 *)p)[i / 4] = make_uint4(w[i], w[i + 1], w[i + 2], w[i + 3]);
#else
    memcpy((void *)on_boundary(p, N == 2 ? 8 : 16), w, 4 * N);
#endif
}

// The lanes of a warp that this code sees: itself on a GPU; on the host, all of them in turn.
#ifdef __CUDACC__
constexpr int LANES = 1;
#else
constexpr int LANES = 32;
#endif

QF_WARP int lane_id(int l) {
#ifdef __CUDACC__
    return (int)threadIdx.x;
#else
    return l;
#endif
}

// d[16][8] = a[16][16] · b[16][8] + c, operands spread over the lanes as mma.m16n8k16 wants them.
template <class T>
QF_WARP void mma(float (*d)[4], const uint32_t (*a)[4], const uint32_t (*b)[2], const float (*c)[4]) {
#ifdef __CUDACC__
#define QF_MMA(KIND)                                                                                              \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "     \
        "{%10,%11,%12,%13};"                                                                                      \
        : "=f"(d[0][0]), "=f"(d[0][1]), "=f"(d[0][2]), "=f"(d[0][3])                                              \
        : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(b[0][0]), "r"(b[0][1]),                     \
          "f"(c[0][0]), "f"(c[0][1]), "f"(c[0][2]), "f"(c[0][3]))
    if constexpr (T::RAISE == 128) QF_MMA("bf16");
    else QF_MMA("f16");
#undef QF_MMA
#else
    // lane 4g + t: a[0] row g, a[1] row g + 8 at columns 2t, 2t + 1; a[2], a[3] the same rows at columns 2t + 8, 2t + 9;
    // b[0] rows 2t, 2t + 1 and b[1] rows 2t + 8, 2t + 9 of column g; c[0], c[1] row g, c[2], c[3] row g + 8, at columns 2t, 2t + 1
    float wide_a[16][16], wide_b[16][8];
    for (int l = 0; l < 32; l++) {
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; i++) {
            float *at = &wide_a[g + 8 * (i & 1)][2 * t + 8 * (i >> 1)];
            at[0] = T::low(a[l][i]), at[1] = T::high(a[l][i]);
        }
        for (int i = 0; i < 2; i++) {
            wide_b[2 * t + 8 * i][g] = T::low(b[l][i]);
            wide_b[2 * t + 8 * i + 1][g] = T::high(b[l][i]);
        }
    }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            const int row = l / 4 + 8 * (i >> 1), column = 2 * (l % 4) + (i & 1);
            double sum = c[l][i];
            for (int k = 0; k < 16; k++) sum += (double)wide_a[row][k] * wide_b[k][column];
            d[l][i] = (float)sum;
        }
#endif
}
