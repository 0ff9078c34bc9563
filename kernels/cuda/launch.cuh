// Kernels over tile.cuh and their entries in the table: two lines per family.
//
//   op           in                                           out
//   linear       x bf16/f16[m, in], m <= 16, in % 8 == 0, planes...     bf16/f16/f32[m, out]
//   dequantize   planes...                                    bf16/f16/f32[out, in]
//
// Planes are [tiles, chunks or groups, ...]; see docs/gpu.md.
#pragma once
#ifdef __CUDACC__
#include "status.cuh"
#endif

#include "../quantforge.h"
#include "tile.cuh"

// A number of the output's dtype (QF_F32, QF_F16 or QF_BF16).
QF_HD void put(void *out, int dtype, int64_t i, float x) {
    if (dtype == QF_F32) ((float *)out)[i] = x;
    else ((uint16_t *)out)[i] = dtype == QF_F16 ? half_of(x) : bf16_of(x);
}

// Of a tile's sums [column][row]: where c[i] of a lane belongs.
QF_HD int place(int lane, int i) { return (2 * (lane & 3) + (i & 1)) * TILE + (lane >> 2) + 8 * (i >> 1); }

// A lane's part of one chunk of one tile, as numbers.
template <class F>
QF_HD void write_weights(const Planes &planes, void *out, int dtype, int64_t step, int lane) {
    constexpr int N = F::SUB / 4;
    const int64_t tile = step / planes.chunks;
    const int chunk = (int)(step - tile * planes.chunks), t = lane & 3;
    const uint8_t *at[planes_of<F>()];
    uint32_t held[2][F::WORDS];
    lane_start<F>(planes, tile, lane >> 2, t, at);
    lane_load<F>(planes, at, tile * TILE + (lane >> 2), chunk, held);
    QF_UNROLL for (int h = 0; h < 2; h++) {
        const int64_t n = tile * TILE + (lane >> 2) + 8 * h;
        QF_UNROLL for (int s = 0; s < F::CHUNK / F::SUB; s++) {
            float w[N];
            tile_values<F>(planes, held[h], s, w);
            const int k = chunk * F::CHUNK + s * F::SUB + t * N;
            if (n >= planes.n_out) continue;
            const int64_t at = n * planes.n_in + k;
            if (k + N > planes.n_in || planes.n_in % 8) {
                for (int i = 0; i < N; i++)
                    if (k + i < planes.n_in) put(out, dtype, at + i, w[i]);
            } else if (dtype == QF_F32) {
                uint32_t words[N];
                QF_UNROLL for (int i = 0; i < N; i++) words[i] = bits_of(w[i]);
                store_words<N>((float *)out + at, words);
            } else {
                uint32_t pairs[N / 2];
                QF_UNROLL for (int i = 0; i < N / 2; i++)
                    pairs[i] = dtype == QF_F16 ? half_of(w[2 * i]) | (uint32_t)half_of(w[2 * i + 1]) << 16
                                               : bf16_of(w[2 * i]) | (uint32_t)bf16_of(w[2 * i + 1]) << 16;
                store_words<N / 2>((uint16_t *)out + at, pairs);
            }
        }
    }
}

// F's table of pairs of T to every copy, by thread `i` of `n`.
template <class F, class T>
QF_HD void fill_table(const Planes &planes, uint32_t *table, int i, int n) {
    constexpr int WORDS = Entry<F>::WORDS;
    if constexpr (WORDS > 0) {
        const uint32_t *from = F::template table<T>(planes);
        for (; i < ENTRIES * COPIES / 4; i += n) {
            uint32_t entry[WORDS], four[4];
            load_words<WORDS>(from + i / (COPIES / 4) * WORDS, entry);
            QF_UNROLL for (int j = 0; j < 4; j++) four[j] = entry[j % WORDS];
            store_words<4>(table + 4 * i, four);
        }
    }
}

template <class F>
QF_HD constexpr int table_words() { return Entry<F>::WORDS > 0 ? ENTRIES * COPIES : 0; }

// More activations take more registers: one tile a block, and fewer warps.
template <class F>
struct Wide : F {
    static constexpr int TILES = 1, WARPS = F::WARPS < 8 ? F::WARPS : 8;
};

#ifdef __CUDACC__
// A block computes F::TILES tiles of rows; its warps share the columns and meet in shared memory.
template <class F, class T, int G>
__global__ void __launch_bounds__(32 * F::WARPS, G > 1) linear_kernel(Planes planes, const uint16_t *x, int m, void *out, int dtype) {
    constexpr int R = F::TILES, N = TILE * COLUMNS;
    extern __shared__ __align__(16) uint32_t shared[];  // the table; [warps][R][G][N] sums
    float *parts = (float *)(shared + table_words<F>());
    const int warps = (int)blockDim.y, warp = (int)threadIdx.y, lane = (int)threadIdx.x;
    Sums<F, G> acc[1];
    const auto ready = [&] {
        fill_table<F, T>(planes, shared, warp * 32 + lane, 32 * warps);
        if (table_words<F>()) __syncthreads();
    };
    tile_dot<F, T, G>(planes, x, m, (int)blockIdx.x * R, warp, warps, shared, ready, acc);
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int g = 0; g < G; g++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                parts[((warp * R + r) * G + g) * N + place(lane, i)] = acc[0][r][g][i];
    __syncthreads();
    for (int i = warp * 32 + lane; i < R * G * N; i += 32 * warps) {
        const int r = i / (G * N), column = i / N % G * COLUMNS + i % N / TILE, row = ((int)blockIdx.x * R + r) * TILE + i % TILE;
        if (column >= m || row >= planes.n_out) continue;
        float sum = 0;
        for (int w = 0; w < warps; w++) sum += parts[w * R * G * N + i];
        put(out, dtype, (int64_t)column * planes.n_out + row, sum);
    }
}

// A warp writes one chunk of one tile.
template <class F>
__global__ void __launch_bounds__(256) dequantize_kernel(Planes planes, void *out, int dtype, int64_t steps) {
    const int64_t step = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (step >= steps) return;
    write_weights<F>(planes, out, dtype, step, (int)threadIdx.x);
}

static inline int launch(const void *kernel, dim3 grid, dim3 block, void **args, size_t shared, void *stream) {
    return status(cudaLaunchKernel(kernel, grid, block, args, shared, (cudaStream_t)stream));
}

static inline int multiprocessors(int *n) {
    int device = 0;
    const int rc = status(cudaGetDevice(&device));
    return rc != QF_OK ? rc : status(cudaDeviceGetAttribute(n, cudaDevAttrMultiProcessorCount, device));
}

template <class F, class T, int G>
static int run_linear(Planes planes, const uint16_t *x, int m, void *out, int dtype, int blocks, int warps, void *stream) {
    void *args[] = {&planes, &x, &m, &out, &dtype};
    const size_t shared = 4 * (table_words<F>() + F::TILES * G * TILE * COLUMNS * (size_t)warps);
    return launch((const void *)linear_kernel<F, T, G>, dim3((unsigned)blocks), dim3(32, (unsigned)warps), args, shared, stream);
}

template <class F>
static int run_dequantize(Planes planes, void *out, int dtype, int64_t steps, void *stream) {
    void *args[] = {&planes, &out, &dtype, &steps};
    return launch((const void *)dequantize_kernel<F>, dim3((unsigned)((steps + 7) / 8)), dim3(32, 8), args, 0, stream);
}

#else  // the same on the host, a block and a warp after another

static inline int multiprocessors(int *n) {
    *n = 4;
    return QF_OK;
}

template <class F, class T, int G>
static int run_linear(const Planes &planes, const uint16_t *x, int m, void *out, int dtype, int blocks, int warps, void *) {
    constexpr int R = F::TILES;
    alignas(16) static uint32_t table[table_words<F>() + 4];
    const auto ready = [&] { fill_table<F, T>(planes, table, 0, 1); };
    for (int tile = 0; tile < blocks * R; tile += R) {
        float parts[R][G][TILE * COLUMNS] = {};
        for (int warp = 0; warp < warps; warp++) {
            Sums<F, G> acc[LANES];
            tile_dot<F, T, G>(planes, x, m, tile, warp, warps, table, ready, acc);
            for (int l = 0; l < LANES; l++)
                for (int r = 0; r < R; r++)
                    for (int g = 0; g < G; g++)
                        for (int i = 0; i < 4; i++) parts[r][g][place(l, i)] += acc[l][r][g][i];
        }
        for (int r = 0; r < R; r++)
            for (int g = 0; g < G; g++)
                for (int i = 0; i < TILE * COLUMNS; i++) {
                    const int column = g * COLUMNS + i / TILE, row = (tile + r) * TILE + i % TILE;
                    if (column < m && row < planes.n_out) put(out, dtype, (int64_t)column * planes.n_out + row, parts[r][g][i]);
                }
    }
    return QF_OK;
}

template <class F>
static int run_dequantize(const Planes &planes, void *out, int dtype, int64_t steps, void *) {
    for (int64_t step = 0; step < steps; step++)
        for (int l = 0; l < LANES; l++) write_weights<F>(planes, out, dtype, step, l);
    return QF_OK;
}

#endif

// True if `a` is as many bytes as that many steps of the plane.
static inline bool has_steps(const qf_array &a, Plane plane, int64_t steps) {
    static const int size[] = {1, 1, 2, 2, 4, 4, 8, 2, 2, 4, 8};  // of a dtype
    int64_t bytes = size[a.dtype];
    for (int d = 0; d < a.ndim; d++) bytes *= a.shape[d];
    return bytes == steps * plane.step();
}

static inline bool is_float(int dtype) { return dtype == QF_F32 || dtype == QF_F16 || dtype == QF_BF16; }

// What planes have to look like: pointers and extents, checked against the dtypes and sizes of `in`.
template <class F>
static int open_planes(const qf_array *in, int n_in, int64_t n_out, int64_t k, Planes *planes) {
    if (n_in != planes_of<F>() || n_out > INT32_MAX / 2 || k > INT32_MAX / 2) return QF_ESHAPE;
    *planes = {};
    planes->n_out = (int32_t)n_out, planes->n_in = (int32_t)k, planes->tiles = (int32_t)((n_out + TILE - 1) / TILE);
    planes->chunks = (int32_t)((k + F::CHUNK - 1) / F::CHUNK);
    for (int i = 0; i < n_in; i++) {
        planes->p[i] = (const uint8_t *)in[i].data;
        if ((uintptr_t)in[i].data % (F::PLANES[i].whole ? 16 : F::PLANES[i].vector())) return QF_ESHAPE;
    }
    if (!F::fits(in, planes)) return QF_ESHAPE;
    for (int i = 0; i < n_in; i++)
        if (!F::PLANES[i].whole && !has_steps(in[i], F::PLANES[i], planes->tiles * F::steps(*planes, i))) return QF_ESHAPE;
    return QF_OK;
}

// As many warps as a multiprocessor has registers for, and all blocks at once where that is possible.
static inline int warps_of(int room, int blocks, int sms, int chunks) {
    const int each = (blocks + sms - 1) / sms, warps = each > room ? 1 : room / each;
    return warps < chunks ? warps : chunks > 0 ? chunks : 1;
}

template <int M> struct Count { static constexpr int N = M; };

template <class F>
int linear(const qf_array *in, int n_in, qf_array *out, int n_out, void *stream) {
    if (n_in < 2 || n_out != 1 || in[0].ndim != 2 || out->ndim != 2) return QF_ESHAPE;
    const int64_t m = in[0].shape[0], k = in[0].shape[1], n = out->shape[1];
    if (m > GROUPS * COLUMNS || out->shape[0] != m || k % 8) return QF_ESHAPE;
    if ((in[0].dtype != QF_F16 && in[0].dtype != QF_BF16) || !is_float(out->dtype)) return QF_EDTYPE;
    if (!m || !n || !k) return QF_OK;
    Planes planes;
    int sms = 0, rc = open_planes<F>(in + 1, n_in - 1, n, k, &planes);
    if (rc == QF_OK) rc = multiprocessors(&sms);
    if (rc != QF_OK) return rc;
    const uint16_t *x = (const uint16_t *)in[0].data;
    const auto go = [&](auto type, auto family, auto groups) {
        using K = decltype(family);
        const int blocks = (planes.tiles + K::TILES - 1) / K::TILES, warps = warps_of(K::WARPS, blocks, sms, planes.chunks);
        return run_linear<K, decltype(type), decltype(groups)::N>(planes, x, (int)m, out->data, out->dtype, blocks, warps, stream);
    };
    if (in[0].dtype == QF_BF16) return m > COLUMNS ? go(Bf16{}, Wide<F>{}, Count<2>{}) : go(Bf16{}, F{}, Count<1>{});
    return m > COLUMNS ? go(F16{}, Wide<F>{}, Count<2>{}) : go(F16{}, F{}, Count<1>{});
}

template <class F>
int dequantize(const qf_array *in, int n_in, qf_array *out, int n_out, void *stream) {
    if (n_in < 1 || n_out != 1 || out->ndim != 2) return QF_ESHAPE;
    if (!is_float(out->dtype)) return QF_EDTYPE;
    if (!out->shape[0] || !out->shape[1]) return QF_OK;
    Planes planes;
    const int rc = open_planes<F>(in, n_in, out->shape[0], out->shape[1], &planes);
    if (rc != QF_OK) return rc;
    const int64_t steps = (int64_t)planes.tiles * planes.chunks;
    return run_dequantize<F>(planes, out->data, out->dtype, steps, stream);
}

#define QF_FAMILY(NAME, ...) {NAME, "linear", linear<__VA_ARGS__>}, {NAME, "dequantize", dequantize<__VA_ARGS__>}
