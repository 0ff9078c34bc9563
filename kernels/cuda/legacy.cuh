// ggml's types of 32 weights under one or two f16: codes, then d (and m) of four neighbouring blocks.
#pragma once
#include "tile.cuh"

struct Q4_0 {
    static constexpr int CHUNK = 128, SUB = 32, DEPTH = 2;
    static constexpr bool MIN = false;
    static constexpr int BYTES[] = {1024, 128};  // of a step, in each plane
    struct Row { uint32_t q[4], d[2]; };
    QF_HD Row load(const Planes &planes, int64_t step, int row, int t) {
        Row r;
        load_codes<16>(planes.p[0], step, row, t, r.q);
        load_params<8>(planes.p[1], step, row, r.d);
        return r;
    }
    template <class T> QF_HD constexpr float offset() { return T::RAISE + 8; }
    template <class T> QF_HD void codes(const Row &r, int s, uint32_t *a) { spread<T, 4>(r.q[s], 0, a); }
    QF_HD float scale(const Row &r, int s) { return half_at(r.d, s); }
    QF_HD float min(const Row &, int) { return 0; }
    QF_HD float value(const Row &r, int s, float code) { return mul(scale(r, s), code); }
};

struct Q8_0 {
    static constexpr int CHUNK = 128, SUB = 32, DEPTH = 2;
    static constexpr bool MIN = false;
    static constexpr int BYTES[] = {2048, 128};  // of a step, in each plane
    struct Row { uint32_t q[8], d[2]; };
    QF_HD Row load(const Planes &planes, int64_t step, int row, int t) {
        Row r;
        load_codes<32>(planes.p[0], step, row, t, r.q);
        load_params<8>(planes.p[1], step, row, r.d);
        return r;
    }
    template <class T> QF_HD constexpr float offset() { return T::RAISE == 1024 ? 1024 + 128 : 0; }
    template <class T> QF_HD void codes(const Row &r, int s, uint32_t *a) {
        spread_bytes<T>(r.q[2 * s], a);
        spread_bytes<T>(r.q[2 * s + 1], a + 2);
    }
    QF_HD float scale(const Row &r, int s) { return half_at(r.d, s); }
    QF_HD float min(const Row &, int) { return 0; }
    QF_HD float value(const Row &r, int s, float code) { return mul(scale(r, s), code); }
};
