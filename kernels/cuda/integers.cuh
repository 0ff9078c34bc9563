// Integers of 4 or 8 bits under a scale (and a zero point) per group of columns or per row: GPTQ, AWQ,
// compressed-tensors, LLM.int8(). Codes are unsigned; their middle, 8 or 128, is what symmetric ones have as zero.
#pragma once
#include "tile.cuh"

enum class Scale { f16, bf16, f32, row };  // row: LLM.int8()'s absmax, f32, of which the scale is a 127th

constexpr int scale_bytes(Scale scale) { return scale == Scale::f16 || scale == Scale::bf16 ? 2 : 4; }

template <int BITS, int PER, int SCALE_BYTES, bool ZERO>
struct IntegerPlanes : Grouped {
    static constexpr Plane PLANES[] = {{4 * BITS, OWN}, {PER * SCALE_BYTES, ROW}};
};
template <int BITS, int PER, int SCALE_BYTES>
struct IntegerPlanes<BITS, PER, SCALE_BYTES, true> : Grouped {
    static constexpr Plane PLANES[] = {{4 * BITS, OWN}, {PER * SCALE_BYTES, ROW}, {PER, ROW}};
};

// PER: groups in a chunk of 128 columns; 1: of as many chunks as the planes' sizes say.
template <int BITS, int PER, Scale SCALE, bool ZERO>
struct Integers : IntegerPlanes<BITS, PER, scale_bytes(SCALE), ZERO> {
    static constexpr int AT = BITS, ZERO_AT = AT + (PER * scale_bytes(SCALE) + 3) / 4;  // words
    static constexpr int WORDS = ZERO_AT + ZERO, CHUNK = 128, SUB = 32, SHARED = 4 / PER, MIDDLE = BITS == 4 ? 8 : 128;
    static constexpr int TILES = BITS == 4 && !(ZERO && PER == 4) ? 2 : 1, SLOTS = BITS == 4 ? 2 : 3, WARPS = 16;
    static constexpr bool MIN = ZERO;

    static bool fits(const qf_array *in, Planes *planes) {
        const int dtypes[] = {QF_F16, QF_BF16, QF_F32, QF_F32};
        return in[1].dtype == dtypes[(int)SCALE] && Grouped::fits(in, planes);
    }

    template <class T> QF_HD constexpr float offset() { return BITS == 4 ? T::RAISE + 8 : bytes_offset<T>(); }
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) {
        if constexpr (BITS == 4) {
            spread<T, 4>(w[s], 0, a);
        } else {
            spread_bytes<T>(w[2 * s], a);
            spread_bytes<T>(w[2 * s + 1], a + 2);
        }
    }
    QF_HD float scale(const uint32_t *w, int s) {
        if constexpr (SCALE == Scale::f16) return half_at(w + AT, s * PER / 4);
        else if constexpr (SCALE == Scale::bf16) return bf16_at(w + AT, s * PER / 4);
        else if constexpr (SCALE == Scale::f32) return float_of(w[AT]);
        else return divide(float_of(w[AT]), 127);
    }
    // A small integer, exact.
    QF_HD float zero(const uint32_t *w, int s) {
        if constexpr (!ZERO) return 0;
        else return sub(float_of(prmt(w[ZERO_AT], 0x4b000000u, 0x7440u | (uint32_t)(s * PER / 4))), 8388608.0f + MIDDLE);
    }
    QF_HD float min(const uint32_t *w, int s) { return mul(scale(w, s), zero(w, s)); }
    QF_HD float value(const uint32_t *w, int s, float code) { return mul(scale(w, s), sub(code, zero(w, s))); }
};

// "int4-p1-f16-z": bits, groups a chunk, scale, with zero points
#define INTEGERS_OF(B, P, S)                                              \
    QF_FAMILY("int" #B "-p" #P "-" #S, Integers<B, P, Scale::S, false>),  \
        QF_FAMILY("int" #B "-p" #P "-" #S "-z", Integers<B, P, Scale::S, true>)
#define INTEGERS(B)                                                                                          \
    INTEGERS_OF(B, 1, f16), INTEGERS_OF(B, 2, f16), INTEGERS_OF(B, 4, f16), INTEGERS_OF(B, 1, bf16),         \
        INTEGERS_OF(B, 2, bf16), INTEGERS_OF(B, 4, bf16), INTEGERS_OF(B, 1, f32)
#define INT8_ROW QF_FAMILY("int8-p1-row", Integers<8, 1, Scale::row, false>)
