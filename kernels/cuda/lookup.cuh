// Types whose codes are entries of a table: 16 numbers, two codes to an index byte (IQ4, FP4, NF4), or
// a codebook of 4 or 8 neighbours, with signs apart (IQ3_XXS, IQ2_XXS). Either way an index byte stands
// for 1, 2 or 4 pairs of numbers, which lie ready in the table.
//
// The table plane: u32[256 · PAIRS] pairs of bf16, the same of f16, and for PAIRS = 1 f32[512], exact.
#pragma once
#include "tile.cuh"

// ---- scales, per sub-block of 32. BYTES: of a step, in each plane; 0: of the whole matrix.

struct HalfPer32 {  // d f16
    static constexpr int CHUNK = 128, PLANES = 1;
    struct Held { uint32_t d[2]; };
    QF_HD void load(const Planes &, const uint8_t *const *p, int64_t step, int row, Held *h) { load_params<8>(p[0], step, row, h->d); }
    QF_HD float scale(const Held &h, int s) { return half_at(h.d, s); }
};

struct Iq4Xs {  // {d f16; u2 high[8]; u4 low[8]} per 256
    static constexpr int CHUNK = 256, PLANES = 1;
    struct Held { uint32_t w[2]; };
    QF_HD void load(const Planes &, const uint8_t *const *p, int64_t step, int row, Held *h) { load_params<8>(p[0], step, row, h->w); }
    QF_HD float scale(const Held &h, int s) {
        const uint32_t l = (h.w[1] >> 4 * s & 15) | (h.w[0] >> (16 + 2 * s) & 3) << 4;
        return mul(half_at(h.w, 0), (float)((int)l - 32));
    }
};

template <int EIGHTHS>
struct Nibbles {  // u4[8] and d f16 per 256: d · (1/2 + nibble) · EIGHTHS/8
    static constexpr int CHUNK = 256, PLANES = 2;
    struct Held { uint32_t w, d; };
    QF_HD void load(const Planes &, const uint8_t *const *p, int64_t step, int row, Held *h) {
        load_params<4>(p[0], step, row, &h->w);
        load_params<2>(p[1], step, row, &h->d);
    }
    QF_HD float scale(const Held &h, int s) {
        return mul(mul(float_of_half(h.d), 0.5f + (float)(h.w >> 4 * s & 15)), EIGHTHS / 8.0f);
    }
};

struct E8m0 {  // a power of two, for doubled levels
    static constexpr int CHUNK = 128, PLANES = 1;
    struct Held { uint32_t e; };
    QF_HD void load(const Planes &, const uint8_t *const *p, int64_t step, int row, Held *h) { load_params<4>(p[0], step, row, &h->e); }
    QF_HD float scale(const Held &h, int s) {
        const uint32_t e = h.e >> 8 * s & 255;
        return float_of(e < 2 ? 0x00200000u << e : (e - 1) << 23);
    }
};

struct FloatPer64 {  // absmax f32
    static constexpr int CHUNK = 128, PLANES = 1;
    struct Held { uint32_t w[2]; };
    QF_HD void load(const Planes &, const uint8_t *const *p, int64_t step, int row, Held *h) { load_params<8>(p[0], step, row, h->w); }
    QF_HD float scale(const Held &h, int s) { return float_of(h.w[s / 2]); }
};

struct Nested {  // absmax u8 per 64: map[it] · nested f32[of 256 of them, row after row] + offset; {f32 map[256], offset}
    static constexpr int CHUNK = 128, PLANES = 3;
    struct Held { uint32_t codes; float nested[2]; const float *map; };
    QF_HD void load(const Planes &planes, const uint8_t *const *p, int64_t step, int row, Held *h) {
        load_params<2>(p[0], step, row, &h->codes);
        h->map = (const float *)p[2];
        const int64_t tile = step / planes.chunks, blocks = planes.n_in / 64;
        const int64_t n = tile * TILE + row, last = planes.n_out * blocks - 1;
        QF_UNROLL for (int i = 0; i < 2; i++) {
            const int64_t block = n * blocks + (step - tile * planes.chunks) * 2 + i;
            h->nested[i] = ((const float *)p[1])[(block < last ? block : last) / 256];  // padding has codes of its own, too
        }
    }
    QF_HD float scale(const Held &h, int s) {
        const float a = add(mul(h.map[h.codes >> 8 * (s / 2) & 255], h.nested[s / 2]), h.map[256]), most = 3.4028234663852886e38f;
        return a > most ? most : a < -most ? -most : a;
    }
};

// ---- the families

template <class S, int PAIRS, bool SIGNS, int... BYTES_>
struct Lookup {
    static constexpr int CHUNK = S::CHUNK, SUB = 32, ENTRY = PAIRS, DEPTH = 2;
    static constexpr int TILES = 1;  // of a block: the registers of two do not suffice
    static constexpr int INDEX = CHUNK / (8 * PAIRS), SIGN = CHUNK / 32;  // a lane's bytes of a chunk
    static constexpr int TABLE = 1 + SIGNS + S::PLANES;
    static constexpr bool MIN = false;
    static constexpr int BYTES[] = {BYTES_..., 0};
    static_assert(sizeof BYTES / sizeof *BYTES == TABLE + 1, "a number for each plane");
    struct Row {
        uint32_t q[INDEX / 4], sign[SIGNS ? SIGN / 4 : 1];
        typename S::Held scale;
    };

    QF_HD Row load(const Planes &planes, int64_t step, int row, int t) {
        Row r;
        load_codes<INDEX>(planes.p[0], step, row, t, r.q);
        if constexpr (SIGNS) load_codes<SIGN>(planes.p[1], step, row, t, r.sign);
        S::load(planes, planes.p + 1 + SIGNS, step, row, &r.scale);
        return r;
    }
    template <class T> QF_HD constexpr float offset() { return 0; }
    QF_HD int index(const Row &r, int s, int i) {
        const int at = s * (4 / PAIRS) + i;
        return (int)(r.q[at / 4] >> 8 * (at % 4) & 255);
    }
    template <class T, int STRIDE>
    QF_HD void codes(const Row &r, int s, Table<STRIDE> table, uint32_t *a) {
        QF_UNROLL for (int i = 0; i < 4 / PAIRS; i++) load_words<PAIRS>(table.at + index(r, s, i) * STRIDE, a + i * PAIRS);
        if constexpr (SIGNS) {
            QF_UNROLL for (int p = 0; p < 4; p++) a[p] ^= r.sign[s / 4] << (15 - (s % 4 * 4 + p)) & 0x80008000u;
        }
    }
    template <class T> QF_HD const uint32_t *table(const Planes &planes) {
        return (const uint32_t *)planes.p[TABLE] + (T::RAISE == 1024 ? ENTRIES * PAIRS : 0);
    }
    QF_HD float scale(const Row &r, int s) { return S::scale(r.scale, s); }
    QF_HD float min(const Row &, int) { return 0; }
    QF_HD void values(const Planes &planes, const Row &r, int s, float *w) {
        const float d = scale(r, s);
        if constexpr (PAIRS == 1) {
            const float *exact = (const float *)(table<F16>(planes) + ENTRIES);
            QF_UNROLL for (int i = 0; i < 8; i++) w[i] = mul(d, exact[2 * index(r, s, i / 2) + i % 2]);
        } else {  // integers
            uint32_t a[4];
            codes<F16>(r, s, Table<PAIRS>{table<F16>(planes)}, a);
            QF_UNROLL for (int i = 0; i < 8; i++) w[i] = mul(d, i % 2 ? F16::high(a[i / 2]) : F16::low(a[i / 2]));
        }
    }
};

using Iq4_nl = Lookup<HalfPer32, 1, false, 1024, 128>;
using Iq4_xs = Lookup<Iq4Xs, 1, false, 2048, 128>;
using Iq3_xxs = Lookup<Nibbles<4>, 2, true, 1024, 512, 64, 32>;
using Iq2_xxs = Lookup<Nibbles<2>, 4, true, 512, 512, 64, 32>;
using Mxfp4 = Lookup<E8m0, 1, false, 1024, 64>;
using Nf4 = Lookup<FloatPer64, 1, false, 1024, 128>;
using Nf4Dq = Lookup<Nested, 1, false, 1024, 32, 0, 0>;

#define LOOKUP_KERNELS                                                                                              \
    QF_FAMILY("iq4_nl", Iq4_nl), QF_FAMILY("iq4_xs", Iq4_xs), QF_FAMILY("iq3_xxs", Iq3_xxs),                        \
        QF_FAMILY("iq2_xxs", Iq2_xxs), QF_FAMILY("mxfp4", Mxfp4), QF_FAMILY("nf4", Nf4), QF_FAMILY("nf4-dq", Nf4Dq)
