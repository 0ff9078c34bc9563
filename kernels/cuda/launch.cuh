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
            tile_values<F>(planes, held[h], s, t, w);
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
QF_HD void fill_table(const Planes &planes, uint32_t *table, uint32_t stride, int i, int n) {
    if constexpr (TableOf<F>::WORDS > 0) {
        const uint32_t *from = F::template table<T>(planes);
        const int copies = (int)stride / 16;  // of four words
        for (; i < F::ENTRIES * copies; i += n) {
            uint32_t entry[F::ENTRY], four[4];
            load_words<F::ENTRY>(from + i / copies * F::ENTRY, entry);
            QF_UNROLL for (int j = 0; j < 4; j++) four[j] = entry[j % F::ENTRY];
            store_words<4>(table + 4 * i, four);
        }
    }
}

// How a product is cut into blocks: of `side` tiles of rows (F::TILES of them to a warp) side by side, which share a
// table; `split` warps share the columns of each and meet in shared memory.
struct Cut {
    int blocks, side, split;
    uint32_t stride;  // bytes of an entry's copies
    int table, sums;  // bytes of shared memory
};

struct Device {
    int multiprocessors, shared;  // the most bytes of shared memory for a block
};

template <class F, int G>
static Cut cut_of(const Planes &planes, const Device &device) {
    const int tiles = (planes.tiles + F::TILES - 1) / F::TILES, each = (tiles + device.multiprocessors - 1) / device.multiprocessors;
    // as many warps as a multiprocessor has registers for, and all tiles at once where that is possible
    const int most = each > F::WARPS ? 1 : F::WARPS / each, split = most < planes.chunks ? most : planes.chunks;
    // a block for each tile, but for tables, which take room and time
    const int side = TableOf<F>::WORDS == 0 ? 1 : each < F::WARPS ? each : F::WARPS;
    const int sums = 4 * F::TILES * G * TILE * COLUMNS * split * side;
    int table = 0, entry = BANKS;
    if constexpr (TableOf<F>::WORDS > 0) {
        for (; entry > F::ENTRY && F::ENTRIES * entry * 4 + sums > device.shared;) entry /= 2;
        table = F::ENTRIES * entry * 4;
    }
    return {(tiles + side - 1) / side, side, split, (uint32_t)entry * 4, table, sums};
}

// More activations take more registers: one tile a block, and fewer warps.
template <class F>
struct Wide : F {
    static constexpr int TILES = 1, WARPS = F::WARPS < 8 ? F::WARPS : 8;
};

#ifdef __CUDACC__
template <class F, class T, int G>
__global__ void __launch_bounds__(32 * F::WARPS, G > 1) linear_kernel(Planes planes, const uint16_t *x, int m, void *out, int dtype, Cut cut) {
    constexpr int R = F::TILES, N = R * G * TILE * COLUMNS;
    extern __shared__ __align__(16) uint32_t shared[];  // the table; [side][split][R][G][TILE * COLUMNS] sums
    float *parts = (float *)(shared + cut.table / 4);
    const int lane = (int)threadIdx.x, warp = (int)(threadIdx.z * blockDim.y + threadIdx.y), warps = cut.side * cut.split;
    const int tile = ((int)blockIdx.x * cut.side + (int)threadIdx.z) * R;
    Sums<F, G> acc[1];
    const auto ready = [&] {
        fill_table<F, T>(planes, shared, cut.stride, warp * 32 + lane, 32 * warps);
        if (TableOf<F>::WORDS) __syncthreads();
    };
    tile_dot<F, T, G>(planes, x, m, tile, (int)threadIdx.y, cut.split, Copies{shared, cut.stride, 0}, ready, acc);
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int g = 0; g < G; g++)
#pragma unroll
            for (int i = 0; i < 4; i++) parts[warp * N + (r * G + g) * TILE * COLUMNS + place(lane, i)] = acc[0][r][g][i];
    __syncthreads();
    for (int i = warp * 32 + lane; i < cut.side * N; i += 32 * warps) {
        const int side = i / N, at = i % N, r = at / (G * TILE * COLUMNS), column = at / TILE % (G * COLUMNS);
        const int row = (((int)blockIdx.x * cut.side + side) * R + r) * TILE + i % TILE;
        if (column >= m || row >= planes.n_out) continue;
        float sum = 0;
        for (int w = 0; w < cut.split; w++) sum += parts[(side * cut.split + w) * N + at];
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

static inline int find_device(Device *found) {
    int device = 0, rc = status(cudaGetDevice(&device));
    if (rc == QF_OK) rc = status(cudaDeviceGetAttribute(&found->multiprocessors, cudaDevAttrMultiProcessorCount, device));
    if (rc == QF_OK) rc = status(cudaDeviceGetAttribute(&found->shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return rc;
}

template <class F, class T, int G>
static int run_linear(Planes planes, const uint16_t *x, int m, void *out, int dtype, const Device &device, Cut cut, void *stream) {
    const void *kernel = (const void *)linear_kernel<F, T, G>;
    const int shared = cut.table + cut.sums;
    if (shared > 48 << 10) {  // what any kernel may have; always to the same limit, as other threads are at it too
        const int rc = status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared));
        if (rc != QF_OK) return rc;
    }
    void *args[] = {&planes, &x, &m, &out, &dtype, &cut};
    return launch(kernel, dim3((unsigned)cut.blocks), dim3(32, (unsigned)cut.split, (unsigned)cut.side), args, (size_t)shared, stream);
}

template <class F>
static int run_dequantize(Planes planes, void *out, int dtype, int64_t steps, void *stream) {
    void *args[] = {&planes, &out, &dtype, &steps};
    return launch((const void *)dequantize_kernel<F>, dim3((unsigned)((steps + 7) / 8)), dim3(32, 8), args, 0, stream);
}

#else  // the same on the host, a block and a warp after another

static inline int find_device(Device *found) {
    *found = {4, 100 << 10};  // as sm_86: not all tables have room for all their copies
    return QF_OK;
}

template <class F, class T, int G>
static int run_linear(const Planes &planes, const uint16_t *x, int m, void *out, int dtype, const Device &, Cut cut, void *) {
    constexpr int R = F::TILES;
    alignas(16) static uint32_t shared[(100 << 10) / 4];
    const auto ready = [&] { fill_table<F, T>(planes, shared, cut.stride, 0, 1); };
    for (int tile = 0; tile < cut.blocks * cut.side * R; tile += R) {
        float parts[R][G][TILE * COLUMNS] = {};
        for (int warp = 0; warp < cut.split; warp++) {
            Sums<F, G> acc[LANES];
            tile_dot<F, T, G>(planes, x, m, tile, warp, cut.split, Copies{shared, cut.stride, 0}, ready, acc);
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

template <int M> struct Count { static constexpr int N = M; };

template <class F>
int linear(const qf_array *in, int n_in, qf_array *out, int n_out, void *stream) {
    if (n_in < 2 || n_out != 1 || in[0].ndim != 2 || out->ndim != 2) return QF_ESHAPE;
    const int64_t m = in[0].shape[0], k = in[0].shape[1], n = out->shape[1];
    if (m > GROUPS * COLUMNS || out->shape[0] != m || k % 8) return QF_ESHAPE;
    if ((in[0].dtype != QF_F16 && in[0].dtype != QF_BF16) || !is_float(out->dtype)) return QF_EDTYPE;
    if (!m || !n || !k) return QF_OK;
    Planes planes;
    Device device = {};
    int rc = open_planes<F>(in + 1, n_in - 1, n, k, &planes);
    if (rc == QF_OK) rc = find_device(&device);
    if (rc != QF_OK) return rc;
    const uint16_t *x = (const uint16_t *)in[0].data;
    const auto go = [&](auto type, auto family, auto groups) {
        using K = decltype(family);
        constexpr int N = decltype(groups)::N;
        return run_linear<K, decltype(type), N>(planes, x, (int)m, out->data, out->dtype, device, cut_of<K, N>(planes, device), stream);
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
