// ggml's types of 32 weights under one or two f16: codes, then d (and m) of four neighbouring blocks.
#pragma once
#include "tile.cuh"

// d · (code − 8)
struct Q4_0 : Chunked {
    static constexpr Plane PLANES[] = {{16, false}, {8, true}};
    static constexpr int WORDS = 6, CHUNK = 128, SUB = 32, TILES = 2, SLOTS = 2, WARPS = 16;
    static constexpr bool MIN = false;
    template <class T> QF_HD constexpr float offset() { return T::RAISE + 8; }
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) { spread<T, 4>(w[s], 0, a); }
    QF_HD float scale(const uint32_t *w, int s) { return half_at(w + 4, s); }
    QF_HD float value(const uint32_t *w, int s, float code) { return mul(scale(w, s), code); }
};

// d · code + m
struct Q4_1 : Chunked {
    static constexpr Plane PLANES[] = {{16, false}, {16, true}};
    static constexpr int WORDS = 8, CHUNK = 128, SUB = 32, TILES = 2, SLOTS = 2, WARPS = 16;
    static constexpr bool MIN = true;
    template <class T> QF_HD constexpr float offset() { return T::RAISE; }
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) { spread<T, 4>(w[s], 0, a); }
    QF_HD float scale(const uint32_t *w, int s) { return half_at(w + 4, 2 * s); }
    QF_HD float min(const uint32_t *w, int s) { return -half_at(w + 4, 2 * s + 1); }
    QF_HD float value(const uint32_t *w, int s, float code) { return sub(mul(scale(w, s), code), min(w, s)); }
};

// d · code
struct Q8_0 : Chunked {
    static constexpr Plane PLANES[] = {{32, false}, {8, true}};
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
