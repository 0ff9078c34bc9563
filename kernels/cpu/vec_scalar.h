// One lane: the specification that every other unit equals bit for bit.
#pragma once
#include "common.h"
#define W 1

struct vf { float v; };
struct vi { int32_t v; };
struct vm { bool v; };

QF_INLINE vf set1(float x) { return {x}; }
QF_INLINE vi set1(int32_t x) { return {x}; }
QF_INLINE vf load(const float *p) { return {*p}; }
QF_INLINE vi load(const int32_t *p) { return {*p}; }
QF_INLINE vi load(const uint8_t *p) { return {*p}; }                                   // W bytes, widened
QF_INLINE void store(float *p, vf a) { *p = a.v; }
QF_INLINE void store(int32_t *p, vi a) { *p = a.v; }
QF_INLINE void stream(float *p, vf a) { *p = a.v; }
QF_INLINE void stream_end() {}
QF_INLINE vi lane_index() { return {0}; }

QF_INLINE vf operator+(vf a, vf b) { return {a.v + b.v}; }
QF_INLINE vf operator-(vf a, vf b) { return {a.v - b.v}; }
QF_INLINE vf operator*(vf a, vf b) { return {a.v * b.v}; }
QF_INLINE vf operator/(vf a, vf b) { return {a.v / b.v}; }
QF_INLINE vf operator-(vf a) { return {-a.v}; }
QF_INLINE vf fma(vf a, vf b, vf c) { return {a.v * b.v + c.v}; }                       // rounded once or twice
QF_INLINE float total(vf a) { return a.v; }
QF_INLINE vf sqrt(vf a) { return {sqrtf(a.v)}; }
QF_INLINE vf abs(vf a) { return {fabsf(a.v)}; }
// a < b ? a : b, with C's behaviour for equal zeros (b is kept), as x86's minps has it
QF_INLINE vf min(vf a, vf b) { return {a.v < b.v ? a.v : b.v}; }
QF_INLINE vf max(vf a, vf b) { return {a.v > b.v ? a.v : b.v}; }

QF_INLINE vi operator+(vi a, vi b) { return {(int32_t)((uint32_t)a.v + (uint32_t)b.v)}; }  // wraps
QF_INLINE vi operator-(vi a, vi b) { return {(int32_t)((uint32_t)a.v - (uint32_t)b.v)}; }
QF_INLINE vi operator*(vi a, vi b) { return {(int32_t)((uint32_t)a.v * (uint32_t)b.v)}; }
QF_INLINE vi operator&(vi a, vi b) { return {a.v & b.v}; }
QF_INLINE vi operator|(vi a, vi b) { return {a.v | b.v}; }
QF_INLINE vi operator^(vi a, vi b) { return {a.v ^ b.v}; }
template <int N> QF_INLINE vi shl(vi a) { return {(int32_t)((uint32_t)a.v << N)}; }
template <int N> QF_INLINE vi shr(vi a) { return {(int32_t)((uint32_t)a.v >> N)}; }     // logical
template <int N> QF_INLINE vi sar(vi a) { return {a.v >> N}; }                          // arithmetic
QF_INLINE vi shl(vi a, vi n) { return {(int32_t)((uint32_t)a.v << n.v)}; }
QF_INLINE vi shr(vi a, vi n) { return {(int32_t)((uint32_t)a.v >> n.v)}; }
QF_INLINE vi min(vi a, vi b) { return {a.v < b.v ? a.v : b.v}; }
QF_INLINE vi max(vi a, vi b) { return {a.v > b.v ? a.v : b.v}; }

QF_INLINE vm operator<(vf a, vf b) { return {a.v < b.v}; }
QF_INLINE vm operator>(vf a, vf b) { return {a.v > b.v}; }
QF_INLINE vm operator<=(vf a, vf b) { return {a.v <= b.v}; }
QF_INLINE vm operator>=(vf a, vf b) { return {a.v >= b.v}; }
QF_INLINE vm operator==(vf a, vf b) { return {a.v == b.v}; }
QF_INLINE vm operator!=(vf a, vf b) { return {a.v != b.v}; }
QF_INLINE vm operator<(vi a, vi b) { return {a.v < b.v}; }
QF_INLINE vm operator>(vi a, vi b) { return {a.v > b.v}; }
QF_INLINE vm operator==(vi a, vi b) { return {a.v == b.v}; }
QF_INLINE vm operator!=(vi a, vi b) { return {a.v != b.v}; }
QF_INLINE vm operator&(vm a, vm b) { return {a.v && b.v}; }
QF_INLINE vm operator|(vm a, vm b) { return {a.v || b.v}; }
QF_INLINE vm operator~(vm a) { return {!a.v}; }
QF_INLINE bool any(vm a) { return a.v; }
QF_INLINE vm all_lanes() { return {true}; }
QF_INLINE vf select(vm m, vf a, vf b) { return m.v ? a : b; }                           // m ? a : b
QF_INLINE vi select(vm m, vi a, vi b) { return m.v ? a : b; }

QF_INLINE vf to_float(vi a) { return {(float)a.v}; }
// Out of range (NaN too) is INT32_MIN, as on x86: some of ggml's bytes come from there.
QF_INLINE vi truncate(vf a) { return {fabsf(a.v) < 2147483648.0f ? (int32_t)a.v : INT32_MIN}; }
QF_INLINE vi round_even(vf a) { return {(int32_t)rintf(a.v)}; }                         // |a| < 2^31
QF_INLINE vi as_int(vf a) { return {(int32_t)bits_of(a.v)}; }
QF_INLINE vf as_float(vi a) { return {float_of((uint32_t)a.v)}; }
QF_INLINE vi to_half(vf a) { return {half_of(a.v)}; }                                   // bits in the low 16
QF_INLINE vf from_half(vi a) { return {float_of_half((uint16_t)a.v)}; }
QF_INLINE vf gather(const float *p, vi i) { return {p[i.v]}; }
QF_INLINE vi gather(const int32_t *p, vi i) { return {p[i.v]}; }
QF_INLINE vf lookup16(const float *table, vi i) { return {table[i.v]}; }                 // 0 <= i < 16
QF_INLINE vi widen_i8(const uint8_t *p) { return {(int8_t)*p}; }                         // W of them to W integers
QF_INLINE vi widen_u16(const uint8_t *p) { uint16_t h; memcpy(&h, p, 2); return {h}; }
QF_INLINE void narrow_u16(uint8_t *p, vi a) { const uint16_t h = (uint16_t)a.v; memcpy(p, &h, 2); }  // 0 <= a < 2^16

// dst[i*W + lane] = src[lane][i] for i < n; n is a multiple of 8
QF_INLINE void transpose_in(const float *const *src, int n, float *dst) {
    memcpy(dst, src[0], (size_t)n * sizeof(float));
}
