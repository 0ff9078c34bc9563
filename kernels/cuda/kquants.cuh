// ggml's K-quants: super-blocks of 256 weights are chunks.
#pragma once
#include "tile.cuh"

// d · sc · code − dmin · m, in 16s; sc and m of 4 bits
struct Q2_K : SuperBlocks {
    static constexpr Plane PLANES[] = {{16, OWN}, {16, ROW}, {4, ROW}};
    static constexpr int WORDS = 9, SUB = 16, TILES = 1, SLOTS = 3, WARPS = 16;
    static constexpr bool MIN = true;
    template <class T> QF_HD constexpr float offset() { return T::RAISE; }
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) { spread<T, 2>(w[s >> 2], 2 * (s & 3), a, 2); }
    QF_HD float scale(const uint32_t *w, int s) { return times_byte(half_at(w + 8, 0), w[4 + (s >> 2)] & 0x0f0f0f0fu, s & 3); }
    QF_HD float min(const uint32_t *w, int s) { return times_byte(half_at(w + 8, 1), w[4 + (s >> 2)] >> 4 & 0x0f0f0f0fu, s & 3); }
    QF_HD float value(const uint32_t *w, int s, float code) { return sub(mul(scale(w, s), code), min(w, s)); }
};

// d · (sc − 32) · (code − 4), in 16s; sc of 6 bits, whose upper two lie apart
struct Q3_K : SuperBlocks {
    static constexpr Plane PLANES[] = {{16, OWN}, {8, OWN}, {12, ROW}, {2, ROW}};
    static constexpr int WORDS = 10, SUB = 16, TILES = 1, SLOTS = 3, WARPS = 16;
    static constexpr bool MIN = false;
    template <class T> QF_HD constexpr float offset() { return T::RAISE + 4; }
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) {
        spread<T, 2>(w[s >> 2], 2 * (s & 3), a, 2);
        spread_high<1, 2>(w[4 + (s >> 3)], 2 * (s & 7), 2, a);
    }
    QF_HD float scale(const uint32_t *w, int s) {
        const int four = s >> 2;  // neighbours, a byte each
        const uint32_t low = w[6 + (four & 1)] >> 4 * (four >> 1) & 0x0f0f0f0fu;
        const uint32_t high = four < 3 ? w[8] << (4 - 2 * four) : w[8] >> 2;
        return times_byte(float_of_half(w[9]), and_or(high, 0x30303030u, low), s & 3, 32);
    }
    QF_HD float value(const uint32_t *w, int s, float code) { return mul(scale(w, s), code); }
};

// Q4_K's and Q5_K's parameters: the 16 bytes {d, dmin, 6-bit scales and mins}.
struct Super : SuperBlocks {
    static constexpr bool MIN = true;
    template <class T> QF_HD constexpr float offset() { return T::RAISE; }
    // Four of the eight scales (mins: second) as bytes.
    QF_HD uint32_t six(const uint32_t *w, int half, int second) {
        const uint32_t low = w[1 + second];
        return half ? and_or(low >> 2, 0x30303030u, w[3] >> 4 * second & 0x0f0f0f0fu) : low & 0x3f3f3f3fu;
    }
    QF_HD float scale_of(const uint32_t *w, int s) { return times_byte(half_at(w, 0), six(w, s >> 2, 0), s & 3); }
    QF_HD float min_of(const uint32_t *w, int s) { return times_byte(half_at(w, 1), six(w, s >> 2, 1), s & 3); }
};

// d · sc · code − dmin · m, in 32s
struct Q4_K : Super {
    static constexpr Plane PLANES[] = {{32, OWN}, {16, ROW}};
    static constexpr int WORDS = 12, SUB = 32, TILES = 1, SLOTS = 2, WARPS = 16;
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) { spread<T, 4>(w[s], 0, a); }
    QF_HD float scale(const uint32_t *w, int s) { return scale_of(w + 8, s); }
    QF_HD float min(const uint32_t *w, int s) { return min_of(w + 8, s); }
    QF_HD float value(const uint32_t *w, int s, float code) { return sub(mul(scale(w, s), code), min(w, s)); }
};

// the same with a fifth bit
struct Q5_K : Super {
    static constexpr Plane PLANES[] = {{32, OWN}, {8, OWN}, {16, ROW}};
    static constexpr int WORDS = 14, SUB = 32, TILES = 1, SLOTS = 2, WARPS = 16;
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) {
        spread<T, 4>(w[s], 0, a);
        spread_high<1, 4>(w[8 + (s >> 2)], 4 * (s & 3), 4, a);
    }
    QF_HD float scale(const uint32_t *w, int s) { return scale_of(w + 10, s); }
    QF_HD float min(const uint32_t *w, int s) { return min_of(w + 10, s); }
    QF_HD float value(const uint32_t *w, int s, float code) { return sub(mul(scale(w, s), code), min(w, s)); }
};

// d · sc · (code − 32), in 16s; sc is signed
struct Q6_K : SuperBlocks {
    static constexpr Plane PLANES[] = {{32, OWN}, {16, OWN}, {16, ROW}, {2, ROW}};
    static constexpr int WORDS = 17, SUB = 16, TILES = 1, SLOTS = 2, WARPS = 12;
    static constexpr bool MIN = false;
    template <class T> QF_HD constexpr float offset() { return T::RAISE + 32; }
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) {
        spread<T, 4>(w[s >> 1], 2 * (s & 1), a, 2);
        spread_high<2, 4>(w[8 + (s >> 2)], 2 * (s & 3), 2, a);
    }
    QF_HD float scale(const uint32_t *w, int s) { return times_byte(float_of_half(w[16]), w[12 + (s >> 2)] ^ 0x80808080u, s & 3, 128); }
    QF_HD float value(const uint32_t *w, int s, float code) { return mul(scale(w, s), code); }
};

#define KQUANT_FAMILIES                                                                                    \
    QF_FAMILY("q2_k", Q2_K), QF_FAMILY("q3_k", Q3_K), QF_FAMILY("q4_k", Q4_K), QF_FAMILY("q5_k", Q5_K),    \
        QF_FAMILY("q6_k", Q6_K)
