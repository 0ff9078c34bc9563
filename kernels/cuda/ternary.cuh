// ggml's types of one or two bits under a scale per 256, 128 or 64 weights.
#pragma once
#include "tile.cuh"

// d · (code − 1), in 256s or 64s
template <int BLOCK>
struct TwoBits : Chunked {
    static constexpr Plane PLANES[] = {{16, OWN}, {512 / BLOCK, ROW}};
    static constexpr int WORDS = BLOCK == 64 ? 6 : 5, CHUNK = 256, SUB = 32, SHARED = BLOCK < 128 ? BLOCK / SUB : 4;
    static constexpr int TILES = 2, SLOTS = 2, WARPS = 16;
    static constexpr bool MIN = false;
    template <class T> QF_HD constexpr float offset() { return T::RAISE + 1; }
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) { spread<T, 2>(w[s >> 1], 4 * (s & 1), a); }
    QF_HD float scale(const uint32_t *w, int s) { return half_at(w + 4, s * SUB / BLOCK); }
    QF_HD float value(const uint32_t *w, int s, float code) { return mul(scale(w, s), code); }
};

// d or −d, in 128s: d · (2 bit − 1)
struct Q1_0 : Chunked {
    static constexpr Plane PLANES[] = {{8, OWN}, {4, ROW}};
    static constexpr int WORDS = 3, CHUNK = 256, SUB = 32, SHARED = 4, TILES = 2, SLOTS = 3, WARPS = 16;
    static constexpr bool MIN = false;
    template <class T> QF_HD constexpr float offset() { return T::RAISE + 1; }
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) {
        QF_UNROLL for (int p = 0; p < 4; p++) a[p] = T::MAGIC;
        spread_high<1, 1>(w[s >> 2], 4 * (s & 3), 4, a);
    }
    QF_HD float scale(const uint32_t *w, int s) { return half_at(w + 2, s >> 2); }
    QF_HD float value(const uint32_t *w, int s, float code) { return mul(scale(w, s), code); }
};

#define TERNARY_FAMILIES QF_FAMILY("tq2_0", TwoBits<256>), QF_FAMILY("q2_0", TwoBits<64>), QF_FAMILY("q1_0", Q1_0)
