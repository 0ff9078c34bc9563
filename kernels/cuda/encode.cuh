// The algorithms of kernels/cpu, compiled for GPUs from the same text: one lane (vec_scalar.h), a
// thread per block or, where groups of a block can be worked on apart, a team of threads. Units are
// built with -fmad=false and IEEE division and square roots, so that float32 sums keep the order
// and rounding of the CPU's: the bytes are the same, which tests/codecs/test_gpu_encode.py shows on
// a CPU by running these units in emulate.h.
//
//   op      in                                                            out, all on the device
//   encode  as on the CPU; codebooks are host arrays, the rest device     u8[rows, row_bytes], i32[1]
//   decode  as on the CPU                                                 f32[rows, in]
//
// Work is put on the caller's stream and nothing waits for it. The second output of encode is set
// to 1 where the weights hold NaN or infinity; the caller clears and reads it.
#pragma once

#ifdef __CUDACC__
#include "status.cuh"
#define QF_LAUNCH(kernel, grid, threads, stream, ...) (kernel<<<(grid), (threads), 0, (cudaStream_t)(stream)>>>(__VA_ARGS__), status(cudaGetLastError()))
#else
#include "emulate.h"
#define QF_LAUNCH(kernel, grid, threads, stream, ...) emulate((grid), (threads), [&] { kernel(__VA_ARGS__); })
#endif

#define QF_CUDA 1
#define QF_INLINE static __device__ __forceinline__
#define QF_FN static __device__ __forceinline__
#define QF_MEMBER __device__ __forceinline__
#define QF_BODY __device__
#define QF_TABLE static __constant__ const
#define QF_UNROLL _Pragma("unroll")
#define QF_UNROLL_GPU _Pragma("unroll")
#define QF_NO_UNROLL_GPU _Pragma("unroll 1")
#include "../cpu/common.h"

namespace {
#include "../cpu/vec_scalar.h"

// ---- team.h

constexpr int WARP = 32;

// This thread's share of 0 .. n-1 in a team of SIZE neighbours.
#define EACH_OF_TEAM(SIZE, i, n) for (int i = (int)(threadIdx.x % (SIZE)); i < (n); i += (SIZE))

#define EACH_STEP_OF_TEAM(i, n, step) EACH_OF_TEAM(WARP, i, n)

QF_INLINE void team_sync() { __syncwarp(); }
QF_INLINE bool first_of_team() { return threadIdx.x == 0; }  // of a warp

template <int SIZE>
QF_INLINE int32_t team_max(int32_t m) {
    QF_UNROLL
    for (int apart = SIZE / 2; apart; apart /= 2) {
        const int32_t other = __shfl_xor_sync(~0u, m, apart);
        m = other > m ? other : m;
    }
    return m;
}

enum { IQ_U = 1, IQ_STRIDE = WARP };
QF_INLINE int team_column() { return (int)threadIdx.x % WARP; }

template <class V, int N>
struct PerGroup {
    V mine;
    QF_MEMBER V &operator[](int) { return mine; }
};

template <int N>
struct Group {
    float x[N];
    QF_MEMBER explicit Group(const float *p) {  // at a multiple of 16 bytes
        QF_UNROLL
        for (int i = 0; i < N; i += 4) {
            const float4 v = *(const float4 *)(p + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    }
    QF_MEMBER operator const float *() const { return x; }
};

// min(max(a, lo), hi) for bounds that are numbers: NaN becomes lo, as there
QF_INLINE vf clamp(vf a, vf lo, vf hi) { return {fminf(fmaxf(a.v, lo.v), hi.v)}; }
QF_INLINE vf least(vf a, vf b) { return {fminf(a.v, b.v)}; }

#include "../cpu/blocks.inc"

// ---- walk.inc

inline bool aligned(const void *p, uintptr_t to) { return (uintptr_t)p % to == 0; }

// The arguments of an encode kernel: the CPU's, and where to report what is not finite.
struct DeviceEncodeArgs : EncodeArgs {
    int32_t *bad;
};

inline int device_encode_args(const qf_array *in, int n_in, qf_array *out, int n_out, int64_t block_size, int64_t type_size, DeviceEncodeArgs *a) {
    if (n_out != 2 || out[1].ndim != 1 || out[1].shape[0] != 1) return QF_ESHAPE;
    if (out[1].dtype != QF_I32) return QF_EDTYPE;
    a->bad = (int32_t *)out[1].data;
    const int rc = encode_args(in, n_in, out, 1, block_size, type_size, a);
    if (rc != QF_OK) return rc;
    return aligned(a->w, 16) && aligned(a->importance, 16) && aligned(a->out, type_size % 4 == 0 ? 4 : type_size % 2 == 0 ? 2 : 1) ? QF_OK : QF_ESHAPE;
}

// Report it if one of x[first], x[first + step], ... x[< n] is not finite.
QF_INLINE void check_finite(const float *x, int n, int first, int step, int32_t *bad) {
    bool found = false;
    for (int i = first; i < n; i += step) found |= (bits_of(x[i]) & 0x7f800000u) == 0x7f800000u;
    if (found) *bad = 1;
}

template <int BLOCK, int TYPE_SIZE, class Body>
__global__ void __launch_bounds__(128) encode_blocks_kernel(DeviceEncodeArgs a, Body body) {
    const int64_t b = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (b >= a.blocks) return;
    const float *const x = a.w + b * BLOCK;
    uint8_t *const out = a.out + b * TYPE_SIZE;
    check_finite(x, BLOCK, 0, 1, a.bad);
    body(x, a.importance ? a.importance + b % (a.in / BLOCK) * BLOCK : nullptr, &out, 1);
}

// One thread per block.
template <int BLOCK, int TYPE_SIZE, class Body>
inline int encode_blocks(const qf_array *in, int n_in, qf_array *out, int n_out, [[maybe_unused]] void *stream, Body body) {
    DeviceEncodeArgs a;
    const int rc = device_encode_args(in, n_in, out, n_out, BLOCK, TYPE_SIZE, &a);
    if (rc != QF_OK || !a.blocks) return rc;
    return QF_LAUNCH((encode_blocks_kernel<BLOCK, TYPE_SIZE, Body>), (unsigned)((a.blocks + 127) / 128), 128, stream, a, body);
}

template <int TEAM, int BLOCK, int TYPE_SIZE, class Work, class Body>
__global__ void __launch_bounds__(WARP) encode_teams_kernel(DeviceEncodeArgs a, Body body) {
    constexpr int TEAMS = WARP / TEAM, WORDS = (TYPE_SIZE + 3) / 4;
    __shared__ Work work[TEAMS];
    __shared__ int32_t words[TEAMS][WORDS];
    const int team = (int)threadIdx.x / TEAM;
    const int64_t mine = (int64_t)blockIdx.x * TEAMS + team, b = mine < a.blocks ? mine : a.blocks - 1;
    const float *const x = a.w + b * BLOCK;
    check_finite(x, BLOCK, (int)threadIdx.x % TEAM, TEAM, a.bad);
    body(x, a.importance ? a.importance + b % (a.in / BLOCK) * BLOCK : nullptr, words[team], work[team]);
    team_sync();
    if (mine != b) return;
    uint8_t *const out = a.out + b * TYPE_SIZE;
    if (TYPE_SIZE % 4 == 0) EACH_OF_TEAM(TEAM, k, TYPE_SIZE / 4) ((int32_t *)out)[k] = words[team][k];
    else EACH_OF_TEAM(TEAM, k, TYPE_SIZE / 2) ((uint16_t *)out)[k] = ((const uint16_t *)words[team])[k];
}

// TEAM threads per block; a warp takes 32 / TEAM of them.
template <int TEAM, int BLOCK, int TYPE_SIZE, class Work, class Body>
inline int encode_teams(const qf_array *in, int n_in, qf_array *out, int n_out, [[maybe_unused]] void *stream, Body body) {
    DeviceEncodeArgs a;
    const int rc = device_encode_args(in, n_in, out, n_out, BLOCK, TYPE_SIZE, &a);
    if (rc != QF_OK || !a.blocks) return rc;
    constexpr int TEAMS = WARP / TEAM;
    return QF_LAUNCH((encode_teams_kernel<TEAM, BLOCK, TYPE_SIZE, Work, Body>), (unsigned)((a.blocks + TEAMS - 1) / TEAMS), WARP, stream, a, body);
}

// sigma2[row]: the mean square of a row, summed from left to right; 32 rows per warp.
__global__ void __launch_bounds__(WARP) row_means_kernel(const float *w, int64_t rows, int64_t in, float *sigma2) {
    __shared__ float tile[WARP][WARP + 1];
    const int lane = (int)threadIdx.x;
    const int64_t first = (int64_t)blockIdx.x * WARP;
    float sum = 0.0f;
    for (int64_t c = 0; c < in; c += WARP) {
        team_sync();
        for (int r = 0; r < WARP; r++) tile[r][lane] = first + r < rows ? w[(first + r) * in + c + lane] : 0.0f;
        team_sync();
        for (int i = 0; i < WARP; i++) sum += tile[lane][i] * tile[lane][i];
    }
    if (first + lane < rows) sigma2[first + lane] = sum / (float)in;
}

template <int TYPE_SIZE, class Body>
__global__ void __launch_bounds__(128) encode_weighted_kernel(DeviceEncodeArgs a, const float *sigma2, Body body) {
    const int64_t b = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, per_row = a.in / 32;
    if (b >= a.blocks) return;
    const Group<32> x(a.w + b * 32), q(a.importance + b % per_row * 32);
    const vf mean = {sigma2[b / per_row]};
    uint8_t *const out = a.out + b * TYPE_SIZE;
    check_finite(x, 32, 0, 1, a.bad);
    float weight[32];
    QF_UNROLL
    for (int i = 0; i < 32; i++) store(weight + i, load(q + i) * sqrt(mean + load(x + i) * load(x + i)));
    body(x, weight, &out, 1);
}

// One thread per block of 32, after a pass for the rows' means.
template <int TYPE_SIZE, class Body>
inline int encode_weighted(const qf_array *in, int n_in, qf_array *out, int n_out, [[maybe_unused]] void *stream, Body body) {
    DeviceEncodeArgs a;
    int rc = device_encode_args(in, n_in, out, n_out, 32, TYPE_SIZE, &a);
    if (rc != QF_OK || !a.blocks) return rc;
    void *room;
    rc = status(cudaMallocAsync(&room, (size_t)a.rows * sizeof(float), (cudaStream_t)stream));
    if (rc != QF_OK) return rc;
    float *const sigma2 = (float *)room;
    rc = QF_LAUNCH(row_means_kernel, (unsigned)((a.rows + WARP - 1) / WARP), WARP, stream, a.w, a.rows, a.in, sigma2);
    if (rc == QF_OK)
        rc = QF_LAUNCH((encode_weighted_kernel<TYPE_SIZE, Body>), (unsigned)((a.blocks + 127) / 128), 128, stream, a, sigma2, body);
    cudaFreeAsync(room, (cudaStream_t)stream);
    return rc;
}

template <int BLOCK, int TYPE_SIZE, class Body>
__global__ void __launch_bounds__(128) decode_blocks_kernel(DecodeArgs a, Body body) {
    const int64_t b = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (b < a.blocks) body(a.data + b * TYPE_SIZE, a.w + b * BLOCK);
}

template <int BLOCK, int TYPE_SIZE, class Body>
inline int decode_blocks(const qf_array *in, int n_in, qf_array *out, int n_out, [[maybe_unused]] void *stream, Body body) {
    DecodeArgs a;
    const int rc = decode_args(in, n_in, out, n_out, BLOCK, TYPE_SIZE, &a);
    if (rc != QF_OK || !a.blocks) return rc;
    return QF_LAUNCH((decode_blocks_kernel<BLOCK, TYPE_SIZE, Body>), (unsigned)((a.blocks + 127) / 128), 128, stream, a, body);
}

}  // namespace
