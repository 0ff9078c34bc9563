// Who works on a block. On a CPU one thread has W blocks, one per lane, and does every group of
// them in turn; on a GPU a team of SIZE threads has one block and each does its own groups
// (kernels/cuda/encode.cuh). Algorithms are written for both: what the groups tell each other lies in
// memory that the team shares, between team_sync()s.
#pragma once

#define EACH_OF_TEAM(SIZE, i, n) for (int i = 0; i < (n); i++)

// Here `step` of them are side by side in vectors; there, a warp takes one each.
#define EACH_STEP_OF_TEAM(i, n, step) for (int i = 0; i < (n); i += (step))

QF_INLINE void team_sync() {}
QF_INLINE bool first_of_team() { return true; }
template <int SIZE> QF_INLINE int32_t team_max(int32_t m) { return m; }

// Tables for IQ_STRIDE groups side by side, a warp's or two vectors' (which hides latencies), of
// which a thread has IQ_U vectors from its column on.
enum { IQ_U = 2, IQ_STRIDE = IQ_U * W };
QF_INLINE int team_column() { return 0; }

// A value for each of N groups that only its own thread needs.
template <class V, int N>
struct PerGroup {
    V of[N];
    V &operator[](int group) { return of[group]; }
};

// The N weights of a group; on a GPU, in registers.
template <int N>
struct Group {
    const float *at;
    explicit Group(const float *x) : at(x) {}
    operator const float *() const { return at; }
};

// min(max(a, lo), hi) for bounds that are numbers
QF_INLINE vf clamp(vf a, vf lo, vf hi) { return min(max(a, lo), hi); }

// The same as min where there is no NaN and no -0.
QF_INLINE vf least(vf a, vf b) { return min(a, b); }
