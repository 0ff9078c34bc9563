// Eight-bit floats (E4M3) under f32 scales: of rows, or of tiles (blocks of 128 rows and columns and more, whole tensors).
#pragma once
#include "tile.cuh"

template <Share SCALES>
struct Fp8 : Grouped {
    static constexpr Plane PLANES[] = {{32, OWN}, {4, SCALES}};
    static constexpr int WORDS = 9, CHUNK = 128, SUB = 32, SHARED = 4, TILES = 1, SLOTS = 3, WARPS = 16;
    static constexpr bool MIN = false;
    static bool fits(const qf_array *in, Planes *planes) { return in[1].dtype == QF_F32 && Grouped::fits(in, planes); }
    template <class T> QF_HD constexpr float offset() { return 0; }
    // A code's bits as those of a T, its exponent too small by the difference of the biases, which a product adds.
    template <class T> QF_HD void codes(const uint32_t *w, int s, uint32_t *a) {
        constexpr bool wide = T::RAISE == 128;         // bf16: eight bits of exponent, biased by 127; f16: five, by 15
        constexpr int at = wide ? 4 : 7;               // of the code's lowest bit
        constexpr uint32_t both = 0x10001u;
        const uint32_t up = T::pair(wide ? 0x1p120f : 0x1p8f);
        QF_UNROLL for (int i = 0; i < 4; i++) {
            const uint32_t two = w[2 * s + i / 2];     // the codes are their bytes 0 and 2, or 1 and 3
            uint32_t bits = (i & 1 ? two >> (8 - at) : two << at) & (0x7f * both << at);
            const uint32_t nan = (bits + (both << at)) & (0x80 * both << at);  // a one above the bits of S.1111.111
            bits += wide ? 15 * nan : nan;             // all ones in the exponent
            a[i] = T::times(and_or(i & 1 ? two : two << 8, 0x80008000u, bits), up);
        }
    }
    QF_HD float scale(const uint32_t *w, int) { return float_of(w[8]); }
    QF_HD float value(const uint32_t *w, int s, float code) { return mul(scale(w, s), code); }
};

#define FP8_FAMILIES QF_FAMILY("fp8-row", Fp8<ROW>), QF_FAMILY("fp8-tile", Fp8<ONE>)
