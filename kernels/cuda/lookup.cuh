// Types whose codes are entries of a table: 16 numbers, two codes to an index byte (IQ4, FP4, NF4), or
// a codebook of 4 or 8 neighbours, with signs apart (IQ3, IQ2) or moved by an eighth (IQ1). Either way an index stands for 1, 2 or
// 4 pairs of numbers, which lie ready in the table. Of indices with more than 8 bits, those above are a plane of their own;
// with IQ1's a bit above them, set where the levels are moved down.
//
// The table plane, the last one: u32[ENTRIES · ENTRY] pairs of bf16, the same of f16 (NF4, FP4: times RAISED), and for
// ENTRY = 1 f32[512], exact.
#pragma once
#include "tile.cuh"

// ---- scales of a sub-block: `exact` as the CPU rounds them; `fast`, a few ulps off, for products

// n bits of w from bit `at` on as the top of a mantissa: 1 + them / 2^n.
template <int N>
QF_HD float one_and(uint32_t w, int at) {
    const int up = 23 - N - at;
    return float_of(and_or(up >= 0 ? w << up : w >> -up, ((1u << N) - 1) << (23 - N), 0x3f800000u));
}

template <class Base>
struct ScalesOf : Base {
    static constexpr int SUB = 32, TILES = 1;
    QF_HD float last(const uint32_t *) { return 1; }  // a second factor, which the CPU multiplies by after the first
};
using Scales = ScalesOf<Chunked>;
using SuperScales = ScalesOf<SuperBlocks>;

struct HalfPer32 : Scales {  // d f16
    static constexpr int CHUNK = 128, PARAMS = 1, WORDS = 2, TILES = 2, SLOTS = 2;
    QF_HD float exact(const uint32_t *w, int s) { return half_at(w, s); }
    QF_HD float fast(const uint32_t *w, int s) { return half_at(w, s); }
};

struct Iq4Xs : SuperScales {  // {d f16; u6 l5, l6; u4 l7 >> 2}, {u6 l0 .. l4; u2 l7 & 3} per 256: d · (l − 32)
    static constexpr int PARAMS = 1, WORDS = 2, SLOTS = 2;
    QF_HD uint32_t eighth(const uint32_t *w) { return (w[0] >> 26 & 0x3c) | w[1] >> 30; }
    QF_HD float exact(const uint32_t *w, int s) {
        const uint32_t l = s < 5 ? w[1] >> 6 * s & 63 : s < 7 ? w[0] >> (16 + 6 * (s - 5)) & 63 : eighth(w);
        return mul(half_at(w, 0), (float)((int)l - 32));
    }
    QF_HD float fast(const uint32_t *w, int s) {
        const float d = half_at(w, 0);
        const float one = s < 5 ? one_and<6>(w[1], 6 * s) : s < 7 ? one_and<6>(w[0], 16 + 6 * (s - 5)) : one_and<6>(eighth(w), 0);
        return fma_(one, 64 * d, -96 * d);
    }
};

template <int EIGHTHS, int N>
struct Nibbles : SuperScales {  // u4[N]; d f16 per 256: d · (1/2 + nibble) · EIGHTHS/8
    static constexpr int SUB = 256 / N, PARAMS = 2, WORDS = N / 8 + 1, SLOTS = N == 8 ? 3 : 2;
    QF_HD float exact(const uint32_t *w, int s) {
        return mul(mul(float_of_half(w[N / 8]), 0.5f + (float)(w[s / 8] >> s % 8 * 4 & 15)), EIGHTHS / 8.0f);
    }
    QF_HD float fast(const uint32_t *w, int s) {
        const float d = float_of_half(w[N / 8]);
        return fma_(one_and<4>(w[s / 8], s % 8 * 4), d * (EIGHTHS * 2.0f), d * (EIGHTHS / 16.0f - EIGHTHS * 2.0f));
    }
};

struct E8m0 : Scales {  // a power of two, for doubled levels
    static constexpr int CHUNK = 128, PARAMS = 1, WORDS = 1, TILES = 2, SLOTS = 2;
    QF_HD float exact(const uint32_t *w, int s) {
        const uint32_t e = w[0] >> 8 * s & 255;
        return float_of(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
    QF_HD float fast(const uint32_t *w, int s) {  // the smallest, 2^-128, as 0, the largest as infinity
        return 0.5f * float_of((s < 3 ? w[0] << (23 - 8 * s) : w[0] >> 1) & 0x7f800000u);
    }
};

struct Ue4m3 : Scales {  // E4M3 per 16, for doubled levels; an f32 of the tile. NaN is 0
    static constexpr int CHUNK = 128, SUB = 16, PARAMS = 2, WORDS = 3, TILES = 2, SLOTS = 2;
    QF_HD int64_t steps(const Planes &planes, int i) { return i == 2 ? 1 : planes.chunks; }
    QF_HD int step(const Planes &, int i, int chunk) { return i == 2 ? 0 : chunk; }
    // A code's exponent and mantissa are the lowest and highest of a float's; 2^119: the biases' difference, and a half.
    QF_HD float exact(const uint32_t *w, int s) {
        const uint32_t four = w[s / 4], nan = ((four & 0x7f7f7f7fu) + 0x01010101u) & ~four & 0x80808080u;  // 0x7f, not 0xff
        const uint32_t codes = four & 0x7f7f7f7fu & ~(nan - (nan >> 7));
        return mul(float_of((s % 4 == 3 ? codes >> 4 : codes << (20 - s % 4 * 8)) & 0x07f00000u), 0x1p119f);
    }
    QF_HD float last(const uint32_t *w) { return float_of(w[2]); }
    QF_HD float fast(const uint32_t *w, int s) { return exact(w, s) * last(w); }
};

// NF4's and FP4's numbers are a little larger in the table: so much that bf16 has them about twice as closely.
constexpr float RAISED = 1.43670654296875f, LOWERED = 1 / RAISED;

struct FloatPer64 : Scales {  // absmax f32
    static constexpr int CHUNK = 128, PARAMS = 1, WORDS = 2, TILES = 2, SLOTS = 2;
    QF_HD float exact(const uint32_t *w, int s) { return float_of(w[s / 2]); }
    QF_HD float fast(const uint32_t *w, int s) { return mul(float_of(w[s / 2]), LOWERED); }
};

// absmax u8 per 64, an index of map: map[it] · nested + offset. Planes of the whole matrix: nested f32, of 256 absmax
// each, row after row, and f32[257]: map, offset.
struct Nested : Scales {
    static constexpr int CHUNK = 128, PARAMS = 3, WORDS = 5, TILES = 2, SLOTS = 2;
    QF_HD void gather(const Planes &planes, int64_t row, int chunk, uint32_t *w) {
        const int blocks = planes.n_in / 64;
        const int64_t last = (int64_t)planes.n_out * blocks - 1, block = row * blocks + 2 * chunk;  // padding has codes, too
        const uint32_t *nested = (const uint32_t *)planes.p[2];
        QF_UNROLL for (int i = 0; i < 2; i++) w[5 + i] = nested[(block + i < last ? block + i : last) >> 8];
        memcpy(w + 7, &planes.p[3], sizeof planes.p[3]);
    }
    QF_HD float exact(const uint32_t *w, int s) {
        const float *map;
        memcpy(&map, w + 3, sizeof map);
        const float a = add(mul(map[w[0] >> 8 * (s / 2) & 255], float_of(w[1 + s / 2])), map[256]), most = 3.4028234663852886e38f;
        return a > most ? most : a < -most ? -most : a;
    }
    QF_HD float fast(const uint32_t *w, int s) { return mul(exact(w, s), LOWERED); }
};

// ---- families: index bytes, what indices have above 8 bits, signs, parameters, table

template <class S, int N, int HIGH = 0, bool SIGNED = false, bool MOVED = false>
struct Lookup : S {
    static constexpr int CHUNK = S::CHUNK, SUB = S::SUB, WARPS = 16, ENTRY = N, ENTRIES = 256 << HIGH;
    static constexpr int LOADED = N * 8 > SUB ? SUB / 8 : N;                    // of an entry that two lanes share, each loads half
    static constexpr int EACH = SUB / 8 / LOADED, INDICES = CHUNK / SUB * EACH;  // of a lane, in a sub-block and in a chunk
    static constexpr int ABOVE = HIGH + MOVED;                                   // bits of an index beside its byte
    static constexpr int HIGHS = INDICES / 4, SIGNS = HIGHS + (INDICES * ABOVE + 31) / 32, PARAMS = SIGNS + (SIGNED ? CHUNK / 128 : 0);
    static constexpr int WORDS = PARAMS + S::WORDS;
    static constexpr bool MIN = false;
    template <class T> QF_HD constexpr float offset() { return 0; }
    template <class T, class Entries>
    QF_HD void codes(const uint32_t *w, int s, const Entries &table, uint32_t *a) {
        QF_UNROLL for (int i = 0; i < EACH; i++) {
            const int at = s * EACH + i, high = at * ABOVE % 32;
            const uint32_t above = ABOVE ? w[HIGHS + at * ABOVE / 32] : 0;
            uint32_t index = prmt(w[at / 4], 0, 0x4440u | (uint32_t)(at % 4));
            if constexpr (HIGH > 0) index = and_or(high < 8 ? above << (8 - high) : above >> (high - 8), ENTRIES - 256, index);
            Entries::template get<LOADED>(table, index, a + i * LOADED);
            if constexpr (MOVED) {
                const int sign = high + HIGH;
                const uint32_t down = (sign < 15 ? above << (15 - sign) : above >> (sign - 15)) & 0x8000;
                QF_UNROLL for (int p = 0; p < LOADED; p++) a[i * LOADED + p] = T::plus(a[i * LOADED + p], down * 0x10001u + T::pair(1));
            }
        }
        if constexpr (SIGNED)
            QF_UNROLL for (int p = 0; p < SUB / 8; p++) {
                const int at = s * (SUB / 8) + p;
                a[p] ^= w[SIGNS + at / 16] << (15 - at % 16) & 0x80008000u;
            }
    }
    QF_HD float scale(const uint32_t *w, int s) { return S::fast(w + PARAMS, s); }
    template <class T> QF_HD const uint32_t *table(const Planes &planes) {
        return (const uint32_t *)planes.p[1 + (HIGH > 0) + SIGNED + S::PARAMS] + (T::RAISE == 1024 ? ENTRIES * N : 0);
    }
    QF_HD void values(const Planes &planes, const uint32_t *w, int s, int t, float *found) {
        const float d = S::exact(w + PARAMS, s), last = S::last(w + PARAMS);
        if constexpr (N == 1) {
            const float *exact = (const float *)(table<F16>(planes) + ENTRIES);
            QF_UNROLL for (int i = 0; i < SUB / 4; i++) {
                const int at = s * EACH + i / 2;
                found[i] = mul(mul(d, exact[2 * (w[at / 4] >> at % 4 * 8 & 255) + i % 2]), last);
            }
        } else {  // integers
            uint32_t a[SUB / 8];
            codes<F16>(w, s, Table{table<F16>(planes) + t * LOADED % N, N}, a);
            QF_UNROLL for (int i = 0; i < SUB / 4; i++) found[i] = mul(mul(d, i % 2 ? F16::high(a[i / 2]) : F16::low(a[i / 2])), last);
        }
    }
};

constexpr Plane WHOLE = {4, ROW, true};

struct Iq4_nl : Lookup<HalfPer32, 1> { static constexpr Plane PLANES[] = {{16, OWN}, {8, ROW}, WHOLE}; };
struct Iq4_xs : Lookup<Iq4Xs, 1> { static constexpr Plane PLANES[] = {{32, OWN}, {8, ROW}, WHOLE}; };
struct Iq3_xxs : Lookup<Nibbles<4, 8>, 2, 0, true> {
    static constexpr Plane PLANES[] = {{16, OWN}, {8, OWN}, {4, ROW}, {2, ROW}, WHOLE};
};
struct Iq3_s : Lookup<Nibbles<16, 8>, 2, 1, true> {
    static constexpr Plane PLANES[] = {{16, OWN}, {2, OWN}, {8, OWN}, {4, ROW}, {2, ROW}, WHOLE};
};
struct Iq2_xxs : Lookup<Nibbles<2, 8>, 4, 0, true> {
    static constexpr Plane PLANES[] = {{8, OWN}, {8, OWN}, {4, ROW}, {2, ROW}, WHOLE};
};
struct Iq2_xs : Lookup<Nibbles<2, 16>, 4, 1, true> {
    static constexpr Plane PLANES[] = {{16, PAIR}, {2, PAIR}, {8, OWN}, {8, ROW}, {2, ROW}, WHOLE};
};
struct Iq2_s : Lookup<Nibbles<2, 16>, 4, 2, true> {
    static constexpr Plane PLANES[] = {{16, PAIR}, {4, PAIR}, {8, OWN}, {8, ROW}, {2, ROW}, WHOLE};
};
// levels are eighths: IQ1's own, times eight
struct Iq1_s : Lookup<Nibbles<2, 8>, 4, 3, false, true> {
    static constexpr Plane PLANES[] = {{8, OWN}, {4, OWN}, {4, ROW}, {2, ROW}, WHOLE};
};
struct Iq1_m : Lookup<Nibbles<2, 16>, 4, 3, false, true> {
    static constexpr Plane PLANES[] = {{16, PAIR}, {8, PAIR}, {8, ROW}, {2, ROW}, WHOLE};
};
struct Mxfp4 : Lookup<E8m0, 1> { static constexpr Plane PLANES[] = {{16, OWN}, {4, ROW}, WHOLE}; };
struct Nvfp4 : Lookup<Ue4m3, 1> { static constexpr Plane PLANES[] = {{16, OWN}, {8, ROW}, {4, ONE}, WHOLE}; };
struct Nf4 : Lookup<FloatPer64, 1> { static constexpr Plane PLANES[] = {{16, OWN}, {8, ROW}, WHOLE}; };
struct Nf4Dq : Lookup<Nested, 1> { static constexpr Plane PLANES[] = {{16, OWN}, {2, ROW}, WHOLE, WHOLE, WHOLE}; };

#define LOOKUP_FAMILIES                                                                                              \
    QF_FAMILY("iq4_nl", Iq4_nl), QF_FAMILY("iq4_xs", Iq4_xs), QF_FAMILY("mxfp4", Mxfp4), QF_FAMILY("nvfp4", Nvfp4), \
        QF_FAMILY("nf4", Nf4), QF_FAMILY("nf4-dq", Nf4Dq)
#define CODEBOOK_FAMILIES                                                                                        \
    QF_FAMILY("iq3_xxs", Iq3_xxs), QF_FAMILY("iq3_s", Iq3_s), QF_FAMILY("iq2_xxs", Iq2_xxs),                     \
        QF_FAMILY("iq2_xs", Iq2_xs), QF_FAMILY("iq2_s", Iq2_s), QF_FAMILY("iq1_s", Iq1_s),                    \
        QF_FAMILY("iq1_m", Iq1_m)
