// The kernels that every family of planes shares, written once for a warp: the product of a tile of
// 16 rows with up to 8 activations (through tensor cores: any number of them costs the same), and
// the numbers that a tile stands for. docs/gpu.md has pictures of planes and tiles.
//
// A family is a struct F with
//   CHUNK        columns that a warp takes at a time: 128 or 256
//   SUB          columns that share a scale: 32 or 16
//   MIN          true if a weight is scale·code − min, false if it is scale·code
//   struct Row   what a lane holds of one row of a chunk
//   load(planes, step, row, t)         Row of lane t of four; step = tile · chunks + chunk
//   codes<T>(row, s, a)                the lane's SUB/4 codes of sub-block s: pairs of T, raised by offset<T>()
//   offset<T>()                        what is taken off codes<T> again
//   scale(row, s), min(row, s)         of sub-block s
//   value(row, s, code)                the weight of an integer code, as the CPU rounds it
// The lane's codes are columns SUB·s + SUB/4·t + 0, 1, 2, ...
#pragma once
#include "bits.cuh"

struct Planes {
    const uint8_t *p[4];
    int32_t n_out, n_in;
    int32_t chunks;     // per row
    int32_t extra[2];   // a family's own
};

constexpr int TILE = 16, COLUMNS = 8;

// x[column][k .. k+N) as pairs; zeros beyond the matrix. N·2 bytes at a time: k, n_in are multiples of 8.
template <int N>
QF_WARP void load_x(const uint16_t *x, int m, int n_in, int column, int k, uint32_t *b) {
    QF_UNROLL for (int i = 0; i < N / 2; i++) b[i] = 0;
    if (column < m && k < n_in) load_words<N / 2>(x + (int64_t)column * n_in + k, b);
}

// Products of R tiles from `tile` on with x[m][n_in], m <= 8: the chunks warp, warp + warps, ...
// acc[lane][r] is the lane's part of mma's c: rows g, g + 8 of tile + r, columns 2t, 2t + 1.
template <class F, class T, int R, int DEPTH>
QF_WARP void tile_dot(const Planes &planes, const uint16_t *x, int m, int tile, int warp, int warps, float (*acc)[R][4]) {
    constexpr int S = F::CHUNK / F::SUB, WORDS = F::SUB / 8;
    constexpr bool SUMS = F::MIN || F::template offset<T>() != 0;
    typename F::Row ring[DEPTH][LANES][R][2];
    const auto fetch = [&](int chunk, typename F::Row (*into)[R][2]) {
        QF_UNROLL for (int l = 0; l < LANES; l++)
            QF_UNROLL for (int r = 0; r < R; r++) {
                const int64_t step = (int64_t)(tile + r) * planes.chunks + chunk;
                const int g = lane_id(l) >> 2, t = lane_id(l) & 3;
                into[l][r][0] = F::load(planes, step, g, t);
                into[l][r][1] = F::load(planes, step, g + 8, t);
            }
    };
    QF_UNROLL for (int l = 0; l < LANES; l++)
        QF_UNROLL for (int r = 0; r < R; r++)
            QF_UNROLL for (int i = 0; i < 4; i++) acc[l][r][i] = 0;
    QF_UNROLL for (int d = 0; d < DEPTH; d++)
        if (warp + d * warps < planes.chunks) fetch(warp + d * warps, ring[d]);
    for (int base = warp; base < planes.chunks; base += DEPTH * warps)
        QF_UNROLL for (int d = 0; d < DEPTH; d++) {
            const int chunk = base + d * warps;
            if (chunk >= planes.chunks) break;
            uint32_t b[LANES][S][WORDS];
            QF_UNROLL for (int l = 0; l < LANES; l++)
                QF_UNROLL for (int s = 0; s < S; s++)
                    load_x<F::SUB / 4>(x, m, planes.n_in, lane_id(l) >> 2,
                                       chunk * F::CHUNK + s * F::SUB + (lane_id(l) & 3) * (F::SUB / 4), b[l][s]);
            typename F::Row now[LANES][R][2];
            memcpy(now, ring[d], sizeof now);
            if (chunk + DEPTH * warps < planes.chunks) fetch(chunk + DEPTH * warps, ring[d]);
            QF_UNROLL for (int s = 0; s < S; s++) {
                uint32_t a[LANES][4], two[LANES][2];
                float sum[LANES][4] = {};  // of the sub-block's activations, in every row
                if constexpr (SUMS) {
                    QF_UNROLL for (int h = 0; h < WORDS / 2; h++) {
                        QF_UNROLL for (int l = 0; l < LANES; l++) {
                            a[l][0] = a[l][1] = a[l][2] = a[l][3] = T::ONES;
                            two[l][0] = b[l][s][2 * h], two[l][1] = b[l][s][2 * h + 1];
                        }
                        mma<T>(sum, a, two);
                    }
                }
                QF_UNROLL for (int r = 0; r < R; r++) {
                    float c[LANES][4];
                    uint32_t codes[LANES][2][WORDS];
                    QF_UNROLL for (int l = 0; l < LANES; l++) {
                        QF_UNROLL for (int i = 0; i < 4; i++) c[l][i] = -F::template offset<T>() * sum[l][i & 1];
                        F::template codes<T>(now[l][r][0], s, codes[l][0]);
                        F::template codes<T>(now[l][r][1], s, codes[l][1]);
                    }
                    QF_UNROLL for (int h = 0; h < WORDS / 2; h++) {
                        QF_UNROLL for (int l = 0; l < LANES; l++) {
                            QF_UNROLL for (int i = 0; i < 4; i++) a[l][i] = codes[l][i & 1][2 * h + (i >> 1)];
                            two[l][0] = b[l][s][2 * h], two[l][1] = b[l][s][2 * h + 1];
                        }
                        mma<T>(c, a, two);
                    }
                    QF_UNROLL for (int l = 0; l < LANES; l++)
                        QF_UNROLL for (int i = 0; i < 4; i++) {
                            const typename F::Row &row = now[l][r][i >> 1];
                            acc[l][r][i] = fma_(F::scale(row, s), c[l][i], acc[l][r][i]);
                            if constexpr (F::MIN) acc[l][r][i] = fma_(-F::min(row, s), sum[l][i & 1], acc[l][r][i]);
                        }
                }
            }
        }
}

// The lane's SUB/4 weights of sub-block s.
template <class F>
QF_HD void tile_values(const typename F::Row &row, int s, float *w) {
    uint32_t a[F::SUB / 8];
    F::template codes<F16>(row, s, a);
    QF_UNROLL for (int i = 0; i < F::SUB / 8; i++) {
        w[2 * i] = F::value(row, s, F16::low(a[i]) - F::template offset<F16>());
        w[2 * i + 1] = F::value(row, s, F16::high(a[i]) - F::template offset<F16>());
    }
}

// ---- what families are made of

// Word i of a plane of N bytes a lane and row: vectors of 16 bytes, 16 rows of 4 lanes each.
template <int N>
QF_HD void load_codes(const uint8_t *plane, int64_t step, int row, int t, uint32_t *w) {
    constexpr int V = N < 16 ? N : 16;
    QF_UNROLL for (int v = 0; v < N / V; v++)
        load_once<V>(plane + ((step * (N / V) + v) * 64 + row * 4 + t) * V, w + 4 * v);
}

// N bytes a row, which its four lanes share.
template <int N>
QF_HD void load_params(const uint8_t *plane, int64_t step, int row, uint32_t *w) {
    load_once<N>(plane + (step * 16 + row) * N, w);
}

// Four fields of WIDTH bits in each half of w, from field `first` on, as numbers raised by T::RAISE.
template <class T, int WIDTH>
QF_HD void spread(uint32_t w, int first, uint32_t *a) {
    constexpr uint32_t mask = ((1u << WIDTH) - 1) * 0x10001u;
    QF_UNROLL for (int p = 0; p < 4; p++) a[p] = (w >> WIDTH * (first + p) & mask) | T::MAGIC;
}

// Adds four fields of WIDTH bits as bits from PLACE on.
template <int WIDTH, int PLACE>
QF_HD void spread_high(uint32_t w, int first, uint32_t *a) {
    constexpr uint32_t mask = ((1u << WIDTH) - 1) << PLACE;
    QF_UNROLL for (int p = 0; p < 4; p++) {
        const int shift = WIDTH * (first + p) - PLACE;
        a[p] |= (shift < 0 ? w << -shift : w >> shift) & mask * 0x10001u;
    }
}

// Bytes 0 and 2, then 1 and 3, of offset-binary codes. bf16 has no room for a magic number above 8 bits: there
// they come as signed integers.
template <class T>
QF_HD void spread_bytes(uint32_t w, uint32_t *a) {
    QF_UNROLL for (int p = 0; p < 2; p++) {
        if constexpr (T::RAISE == 1024) {
            a[p] = prmt(w, T::MAGIC, p ? 0x5351 : 0x5250);
        } else {
            // (128 + low seven bits) − (256 or, with the top bit set, 128)
            const uint32_t v = w >> 8 * p;
            a[p] = Bf16::minus((v & 0x007f007fu) | Bf16::MAGIC, (~v & 0x00800080u) | Bf16::MAGIC);
        }
    }
}

QF_HD float half_at(const uint32_t *w, int i) { return float_of_half(w[i >> 1] >> 16 * (i & 1) & 0xffffu); }
