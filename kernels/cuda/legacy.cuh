// ggml's types of 32 weights under one or two f16: codes, then d (and m) of four neighbouring blocks.
#pragma once
#include "tile.cuh"

// d · (code − 8)
struct Q4_0 : Chunked {
    static constexpr Plane PLANES[] = {{16, OWN}, {8, ROW}};
    static constexpr int WORDS = 6, CHUNK = 128, SUB = 32, TILES = 2, SLOTS = 2, WARPS = 16;
    static constexpr bool MIN = false;
    template <class T> QF_HD constexpr float offset() { return T::RAISE + 8; }
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) { spread<T, 4>(w[s], 0, a); }
    QF_HD float scale(const uint32_t *w, int s) { return half_at(w + 4, s); }
    QF_HD float value(const uint32_t *w, int s, float code) { return mul(scale(w, s), code); }
};

// d · code + m
struct Q4_1 : Chunked {
    static constexpr Plane PLANES[] = {{16, OWN}, {16, ROW}};
    static constexpr int WORDS = 8, CHUNK = 128, SUB = 32, TILES = 2, SLOTS = 2, WARPS = 16;
    static constexpr bool MIN = true;
    template <class T> QF_HD constexpr float offset() { return T::RAISE; }
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) { spread<T, 4>(w[s], 0, a); }
    QF_HD float scale(const uint32_t *w, int s) { return half_at(w + 4, 2 * s); }
    QF_HD float min(const uint32_t *w, int s) { return -half_at(w + 4, 2 * s + 1); }
    QF_HD float value(const uint32_t *w, int s, float code) { return sub(mul(scale(w, s), code), min(w, s)); }
};

// d · (code − 16), in two planes
struct Q5_0 : Chunked {
    static constexpr Plane PLANES[] = {{16, OWN}, {4, OWN}, {8, ROW}};
    static constexpr int WORDS = 7, CHUNK = 128, SUB = 32, TILES = 2, SLOTS = 2, WARPS = 16;
    static constexpr bool MIN = false;
    template <class T> QF_HD constexpr float offset() { return T::RAISE + 16; }
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) {
        spread<T, 4>(w[s], 0, a);
        spread_high<1, 4>(w[4], 4 * s, 4, a);
    }
    QF_HD float scale(const uint32_t *w, int s) { return half_at(w + 5, s); }
    QF_HD float value(const uint32_t *w, int s, float code) { return mul(scale(w, s), code); }
};

// d · code + m, in two planes
struct Q5_1 : Chunked {
    static constexpr Plane PLANES[] = {{16, OWN}, {4, OWN}, {16, ROW}};
    static constexpr int WORDS = 9, CHUNK = 128, SUB = 32, TILES = 1, SLOTS = 3, WARPS = 16;
    static constexpr bool MIN = true;
    template <class T> QF_HD constexpr float offset() { return T::RAISE; }
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) { Q5_0::codes<T>(w, s, a); }
    QF_HD float scale(const uint32_t *w, int s) { return half_at(w + 5, 2 * s); }
    QF_HD float min(const uint32_t *w, int s) { return -half_at(w + 5, 2 * s + 1); }
    QF_HD float value(const uint32_t *w, int s, float code) { return sub(mul(scale(w, s), code), min(w, s)); }
};

// d · code
struct Q8_0 : Chunked {
    static constexpr Plane PLANES[] = {{32, OWN}, {8, ROW}};
    static constexpr int WORDS = 10, CHUNK = 128, SUB = 32, TILES = 1, SLOTS = 3, WARPS = 16;
    static constexpr bool MIN = false;
    template <class T> QF_HD constexpr float offset() { return bytes_offset<T>(); }
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) {
        spread_bytes<T>(w[2 * s], a);
        spread_bytes<T>(w[2 * s + 1], a + 2);
    }
    QF_HD float scale(const uint32_t *w, int s) { return half_at(w + 8, s); }
    QF_HD float value(const uint32_t *w, int s, float code) { return mul(scale(w, s), code); }
};

#define LEGACY_FAMILIES                                                                                    \
    QF_FAMILY("q4_0", Q4_0), QF_FAMILY("q4_1", Q4_1), QF_FAMILY("q5_0", Q5_0), QF_FAMILY("q5_1", Q5_1),    \
        QF_FAMILY("q8_0", Q8_0)
