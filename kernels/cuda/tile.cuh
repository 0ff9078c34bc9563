// The kernels that every family of planes shares, written once for a warp: the product of a tile of
// 16 rows with up to 16 activations (through tensor cores: 1 and 8 cost the same), and
// the numbers that a tile stands for. docs/gpu.md has pictures of planes and tiles.
//
// A family is a struct F with
//   PLANES       what a row of a chunk has in each plane; WORDS: a lane's words of all of them
//   CHUNK        columns that a warp takes at a time: 128 or 256
//   SUB          columns of a sub-block: 32 or 16
//   SHARED       sub-blocks that share a scale
//   MIN          true if a weight is scale·code − min, false if it is scale·code
//   TILES        tiles that a warp takes side by side: they share the activations
//   SLOTS        chunks that a warp holds: one it computes with, the others are on their way
//   WARPS        of a multiprocessor: 16 leave 128 registers a thread, 12 leave 168
//   PARTIAL      true if a row may end within a chunk
//   codes<T>(w, s, a)        the lane's SUB/4 codes of sub-block s: pairs of T, raised by offset<T>()
//   offset<T>()              what is taken off codes<T> again
//   scale(w, s), min(w, s)   of sub-block s
//   value(w, s, code)        the weight of an integer code, as the CPU rounds it
// or, where codes are entries of a table (lookup.cuh), ENTRIES of ENTRY words, of which a lane loads LOADED; codes<T>(w, s,
// table, a), and values(planes, w, s, t, found) instead of value.
// w: the lane's words of one row of a chunk, plane after plane. The lane's codes are columns
// SUB·s + SUB/4·t + 0, 1, 2, ...
#pragma once
#include "../quantforge.h"
#include "bits.cuh"

constexpr int TILE = 16, COLUMNS = 8, GROUPS = 2;  // rows; activations of an instruction; and of them at most

// Who gets the bytes of a plane: each of a row's four lanes its own, two neighbours the same, all four the same; or all
// rows of the tile. Its value: parts of a row.
enum Share { ONE = 0, ROW = 1, PAIR = 2, OWN = 4 };

// Bytes of a chunk for whoever shares them. A plane of the whole matrix is no lane's: a family reads it by itself.
struct Plane {
    int bytes;
    Share share;
    bool whole = false;
    QF_MEMBER constexpr int words() const { return whole ? 0 : (bytes + 3) / 4; }
    QF_MEMBER constexpr int vector() const { return bytes & 15 ? bytes & -bytes : 16; }  // bytes of a load
    // from a row to the next, and from a lane's vector to its next one: a row's parameters lie together, of codes all first vectors
    QF_MEMBER constexpr int row() const { return share > ROW ? share * vector() : share * bytes; }
    QF_MEMBER constexpr int next() const { return share > ROW ? TILE * row() : vector(); }
    QF_MEMBER constexpr int step() const { return share ? TILE * bytes * share : bytes; }  // from a chunk to the next
};

// A matrix in planes, as kernels get it.
struct Planes {
    const uint8_t *p[6];
    int32_t n_out, n_in, tiles;
    int32_t chunks;      // per row
    int32_t groups;      // of parameters (Grouped): of a row, and 2^32 / the chunks of one
    uint32_t per_group;
};

template <class F>
QF_HD constexpr int planes_of() { return (int)(sizeof F::PLANES / sizeof F::PLANES[0]); }

// Where word 0 of plane i is in a lane's words.
template <class F>
QF_HD constexpr int first_word(int i) {
    int n = 0;
    for (int j = 0; j < i; j++) n += F::PLANES[j].words();
    return n;
}

// Where a lane's part of row g of a tile begins in every plane.
template <class F, int I = 0>
QF_HD void lane_start(const Planes &planes, int64_t tile, int g, int t, const uint8_t **at) {
    if constexpr (I < planes_of<F>()) {
        constexpr Plane plane = F::PLANES[I];
        if constexpr (!plane.whole)
            at[I] = planes.p[I] + tile * F::steps(planes, I) * plane.step() + g * plane.row() + t * plane.share / 4 * plane.vector();
        lane_start<F, I + 1>(planes, tile, g, t, at);
    }
}

// Rows g and g + 8 of a chunk; row: g of the whole matrix.
template <class F, int I = 0>
QF_HD void lane_load(const Planes &planes, const uint8_t *const *at, int64_t row, int chunk, uint32_t (*w)[F::WORDS]) {
    if constexpr (I == planes_of<F>()) {
        QF_UNROLL for (int h = 0; h < 2; h++) F::gather(planes, row + 8 * h, chunk, w[h]);
    } else if constexpr (F::PLANES[I].whole) {
        lane_load<F, I + 1>(planes, at, row, chunk, w);
    } else {
        constexpr Plane plane = F::PLANES[I];
        constexpr int first = first_word<F>(I), vector = plane.vector();
        const uint8_t *p = at[I] + (int64_t)F::step(planes, I, chunk) * plane.step();
        QF_UNROLL for (int h = 0; h < 2; h++)
            QF_UNROLL for (int v = 0; v < plane.bytes / vector; v++)
                load_once<vector>(p + v * plane.next() + 8 * h * plane.row(), w[h] + first + v * (vector / 4));
        lane_load<F, I + 1>(planes, at, row, chunk, w);
    }
}

// What most families inherit: every plane has all chunks.
struct Chunked {
    static constexpr int SHARED = 1;
    static constexpr bool PARTIAL = true;                                     // the last chunk of a row
    static bool fits(const qf_array *, Planes *) { return true; }             // the planes beyond their sizes
    QF_HD int64_t steps(const Planes &planes, int) { return planes.chunks; }  // of a tile in plane i
    QF_HD int step(const Planes &, int, int chunk) { return chunk; }          // of a chunk
    QF_HD float min(const uint32_t *, int) { return 0; }
    QF_HD void gather(const Planes &, int64_t, int, uint32_t *) {}            // words of planes of the whole matrix
};

// Of types with blocks of 256 weights, which are chunks.
struct SuperBlocks : Chunked {
    static constexpr int CHUNK = 256;
    static constexpr bool PARTIAL = false;
    static bool fits(const qf_array *, Planes *planes) { return planes->n_in % CHUNK == 0; }
};

// Of planes with parameters of groups of columns, as many chunks each; how many groups, the second plane's shape says.
struct Grouped : Chunked {
    static bool fits(const qf_array *in, Planes *planes) {
        const int64_t groups = in[1].ndim == 3 ? in[1].shape[1] : 0;
        if (groups < 1 || groups > planes->chunks) return false;
        planes->groups = (int32_t)groups;
        // chunk / that many, as a product: exact as long as chunk · that < 2^32
        const int64_t each = (planes->chunks + groups - 1) / groups;
        planes->per_group = each == 1 ? 0 : (uint32_t)(((int64_t)1 << 32) / each + 1);
        return (planes->chunks - 1) / each + 1 == groups && planes->chunks * each < ((int64_t)1 << 32);
    }
    QF_HD int64_t steps(const Planes &planes, int i) { return i ? planes.groups : planes.chunks; }
    QF_HD int step(const Planes &planes, int i, int chunk) {
        return i && planes.per_group ? (int)((uint64_t)chunk * planes.per_group >> 32) : chunk;
    }
};

// Words of F's table; 0: it has none.
template <class F, class = void> struct TableOf { static constexpr int WORDS = 0; };
template <class F> struct TableOf<F, decltype((void)F::ENTRY)> { static constexpr int WORDS = F::ENTRIES * F::ENTRY; };

// A table in global memory; words: where this lane's part of entry 0 is.
struct Table {
    const uint32_t *words;
    uint32_t entry;  // words
    template <int N>
    QF_HD void get(const Table &t, uint32_t index, uint32_t *a) { load_words<N>(t.words + index * t.entry, a); }
};

// In shared memory every lane has a copy of the table (or as many lanes as a load serves at once), each in
// banks of its own: BANKS words an entry. Where there is less room, several lanes share one.
constexpr int BANKS = 32;

struct Copies {
    const uint32_t *words;
    uint32_t stride, lane;  // bytes: from an entry to the next; of this lane's copy
    template <int N>
    QF_HD void get(const Copies &t, uint32_t index, uint32_t *a) {
#ifdef __CUDA_ARCH__
        const uint32_t at = (uint32_t)__cvta_generic_to_shared(t.words) + t.lane + index * t.stride;
        if constexpr (N == 1) asm("ld.shared.u32 %0, [%1];" : "=r"(a[0]) : "r"(at));
        else if constexpr (N == 2) asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(a[0]), "=r"(a[1]) : "r"(at));
        else asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at));
#else
        load_words<N>((const char *)t.words + t.lane + index * t.stride, a);
#endif
    }
};

// The lane's codes of sub-block s, of families with and without a table.
template <class F, class T>
QF_WARP void lane_codes(const uint32_t *w, int s, Copies table, int l, uint32_t *a) {
    if constexpr (TableOf<F>::WORDS > 0) {
        if constexpr (F::ENTRIES == 256) table.stride = BANKS * 4;  // always fits
        // neighbours that load parts of one entry have it from one copy
        table.lane = (uint32_t)lane_id(l) * (F::LOADED * 4) & (table.stride - 1);
        F::template codes<T>(w, s, table, a);
    } else {
        F::template codes<T>(w, s, a);
    }
}

// x[column][k .. k+N) as pairs; zeros beyond the matrix. p: x[column] or, if there is no such column, null;
// k and n_in are multiples of N.
template <class F>
QF_WARP void load_x(const uint16_t *p, int k, [[maybe_unused]] int n_in, uint32_t *b) {
    constexpr int N = F::SUB / 8;
    QF_UNROLL for (int i = 0; i < N; i++) b[i] = 0;
    if (p && (!F::PARTIAL || k < n_in)) load_words<N>(p + k, b);
}

// A lane's sums for TILES tiles and G groups of 8 activations.
template <class F, int G>
using Sums = float[F::TILES][G][4];

// Adds the product of one chunk: w is what lanes hold of its rows, x[g] the activations of the lane's column in group g.
template <class F, class T, int G>
QF_WARP void chunk_dot(const uint32_t (*w)[F::TILES][2][F::WORDS], const uint16_t *const (*x)[G], int k, int n_in, const Copies &table,
                       Sums<F, G> *acc) {
    constexpr int S = 128 / F::SUB, WORDS = F::SUB / 8;
    QF_UNROLL for (int part = 0; part < F::CHUNK / 128; part++) {
        uint32_t b[LANES][G][S][WORDS];
        if constexpr (G > 1) keep_order();  // the next part's activations would take the registers of this one's
        QF_UNROLL for (int l = 0; l < LANES; l++)
            QF_UNROLL for (int g = 0; g < G; g++)
                QF_UNROLL for (int s = 0; s < S; s++)
                    load_x<F>(x[l][g], k + part * 128 + s * F::SUB + (lane_id(l) & 3) * (F::SUB / 4), n_in, b[l][g][s]);
        QF_UNROLL for (int first = 0; first < S; first += F::SHARED) {
            const int sub = part * S + first;
            uint32_t a[LANES][4], two[LANES][2];
            float sum[G][LANES][4] = {}, start[G][LANES][4] = {};
            // their activations times a constant, in every row: −offset, or 1 where a min needs the sum too
            if constexpr (F::MIN || F::template offset<T>() != 0)
                QF_UNROLL for (int g = 0; g < G; g++)
                    QF_UNROLL for (int h = 0; h < F::SHARED * WORDS / 2; h++) {
                        QF_UNROLL for (int l = 0; l < LANES; l++) {
                            QF_UNROLL for (int i = 0; i < 4; i++) a[l][i] = opaque(T::pair(F::MIN ? 1 : -F::template offset<T>()), i);
                            QF_UNROLL for (int i = 0; i < 2; i++) two[l][i] = b[l][g][first + 2 * h / WORDS][2 * h % WORDS + i];
                        }
                        mma<T>(sum[g], a, two, sum[g]);
                    }
            QF_UNROLL for (int g = 0; g < G; g++)
                QF_UNROLL for (int l = 0; l < LANES; l++)
                    QF_UNROLL for (int i = 0; i < 4; i++) start[g][l][i] = F::MIN ? 0 : sum[g][l][i];
            QF_UNROLL for (int r = 0; r < F::TILES; r++) {
                float c[G][LANES][4];
                QF_UNROLL for (int s = 0; s < F::SHARED; s++) {
                    uint32_t codes[LANES][2][WORDS];
                    QF_UNROLL for (int l = 0; l < LANES; l++)
                        QF_UNROLL for (int h = 0; h < 2; h++) lane_codes<F, T>(w[l][r][h], sub + s, table, l, codes[l][h]);
                    QF_UNROLL for (int g = 0; g < G; g++)
                        QF_UNROLL for (int h = 0; h < WORDS / 2; h++) {
                            QF_UNROLL for (int l = 0; l < LANES; l++) {
                                QF_UNROLL for (int i = 0; i < 4; i++) a[l][i] = codes[l][i & 1][2 * h + (i >> 1)];
                                QF_UNROLL for (int i = 0; i < 2; i++) two[l][i] = b[l][g][first + s][2 * h + i];
                            }
                            mma<T>(c[g], a, two, s || h ? c[g] : start[g]);
                        }
                }
                QF_UNROLL for (int l = 0; l < LANES; l++)
                    QF_UNROLL for (int i = 0; i < 4; i++) {
                        const uint32_t *row = w[l][r][i >> 1];
                        const float scale = F::scale(row, sub);
                        QF_UNROLL for (int g = 0; g < G; g++) {
                            float &to = acc[l][r][g][i];
                            to = fma_(scale, c[g][l][i], to);
                            if constexpr (F::MIN) to = fma_(-fma_(scale, F::template offset<T>(), F::min(row, sub)), sum[g][l][i], to);
                        }
                    }
            }
        }
    }
}

// Products of F::TILES tiles from `tile` on with x[m][n_in], m <= 8 G: the chunks warp, warp + warps, ...
// acc[lane][r][g] is the lane's part of mma's c: rows lane / 4, lane / 4 + 8 of tile + r, columns 8 g + 2t, 2t + 1.
// `ready` is called with the first loads under way; from then on `table` holds F's.
template <class F, class T, int G, class Ready>
QF_WARP void tile_dot(const Planes &planes, const uint16_t *x, int m, int tile, int warp, int warps, Copies table,
                      Ready ready, Sums<F, G> *acc) {
    uint32_t held[F::SLOTS][LANES][F::TILES][2][F::WORDS];
    const uint8_t *at[LANES][F::TILES][planes_of<F>()];
    const uint16_t *column[LANES][G];
    QF_UNROLL for (int l = 0; l < LANES; l++) {
        const int row = lane_id(l) >> 2, t = lane_id(l) & 3;
        QF_UNROLL for (int g = 0; g < G; g++) column[l][g] = 8 * g + row < m ? x + (int64_t)(8 * g + row) * planes.n_in : nullptr;
        QF_UNROLL for (int r = 0; r < F::TILES; r++) {
            // the last block may have tiles too many
            lane_start<F>(planes, tile + r < planes.tiles ? tile + r : planes.tiles - 1, row, t, at[l][r]);
            QF_UNROLL for (int g = 0; g < G; g++)
                QF_UNROLL for (int i = 0; i < 4; i++) acc[l][r][g][i] = 0;
        }
    }
    const auto fetch = [&](int chunk, uint32_t (*into)[F::TILES][2][F::WORDS]) {
        if (chunk >= planes.chunks) return;
        QF_UNROLL for (int l = 0; l < LANES; l++)
            QF_UNROLL for (int r = 0; r < F::TILES; r++)
                lane_load<F>(planes, at[l][r], (int64_t)(tile + r) * TILE + (lane_id(l) >> 2), chunk, into[l][r]);
    };
    QF_UNROLL for (int d = 0; d < F::SLOTS; d++) fetch(warp + d * warps, held[d]);
    ready();
    hide(table.words);  // its loads are assembly, which a barrier alone does not hold back
    for (int base = warp; base < planes.chunks; base += F::SLOTS * warps)
        QF_UNROLL for (int d = 0; d < F::SLOTS; d++) {
            const int chunk = base + d * warps;
            if (chunk >= planes.chunks) break;
            chunk_dot<F, T, G>(held[d], column, chunk * F::CHUNK, planes.n_in, table, acc);
            fetch(chunk + F::SLOTS * warps, held[d]);
        }
}

// The SUB/4 weights of lane t of a row in sub-block s.
template <class F>
QF_HD void tile_values(const Planes &planes, const uint32_t *w, int s, [[maybe_unused]] int t, float *found) {
    if constexpr (TableOf<F>::WORDS > 0) {
        F::values(planes, w, s, t, found);
    } else {
        uint32_t a[F::SUB / 8];
        F::template codes<F16>(w, s, a);
        QF_UNROLL for (int i = 0; i < F::SUB / 8; i++) {
            found[2 * i] = F::value(w, s, F16::low(a[i]) - F::template offset<F16>());
            found[2 * i + 1] = F::value(w, s, F16::high(a[i]) - F::template offset<F16>());
        }
    }
}

// ---- what families are made of

// N fields of WIDTH bits in each half of w, from field `first` on, as numbers raised by T::RAISE.
template <class T, int WIDTH>
QF_HD void spread(uint32_t w, int first, uint32_t *a, int n = 4) {
    constexpr uint32_t mask = ((1u << WIDTH) - 1) * 0x10001u;
    QF_UNROLL for (int p = 0; p < n; p++) a[p] = and_or(w >> WIDTH * (first + p), mask, T::MAGIC);
}

// Adds fields of WIDTH bits to them as their bits from PLACE on.
template <int WIDTH, int PLACE>
QF_HD void spread_high(uint32_t w, int first, int n, uint32_t *a) {
    constexpr uint32_t mask = (((1u << WIDTH) - 1) << PLACE) * 0x10001u;
    QF_UNROLL for (int p = 0; p < n; p++) {
        const int shift = WIDTH * (first + p) - PLACE;
        a[p] = and_or(shift < 0 ? w << -shift : w >> shift, mask, a[p]);
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
            a[p] = Bf16::minus(and_or(w >> 8 * p, 0x007f007fu, Bf16::MAGIC), and_or(~w >> 8 * p, 0x00800080u, Bf16::MAGIC));
        }
    }
}

// What is taken off what spread_bytes gives, for signed numbers.
template <class T>
QF_HD constexpr float bytes_offset() { return T::RAISE == 1024 ? 1024 + 128 : 0; }

// Half i of an array of words.
QF_HD float half_at(const uint32_t *w, int i) { return float_of_half(w[i >> 1] >> 16 * (i & 1) & 0xffffu); }

QF_HD float bf16_at(const uint32_t *w, int i) { return float_of_bf16(w[i >> 1] >> 16 * (i & 1) & 0xffffu); }

// scale · (byte i of w − zero), rounded once, without the slow conversion: 2^15 + the byte is a float with the byte in
// the middle of its mantissa, and (2^15 + zero) · scale is exact for a scale of 11 bits.
QF_HD float times_byte(float scale, uint32_t w, int i, float zero = 0) {
    return fma_(scale, float_of(prmt(w, opaque(0x47000000u), 0x7404u | (uint32_t)i << 4)), -(32768.0f + zero) * scale);
}
