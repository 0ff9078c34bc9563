// Four lanes (AArch64).
#pragma once

#include "common.h"
#define W 4

struct vf { float32x4_t v; };
struct vi { int32x4_t v; };
struct vm { uint32x4_t v; };  // all bits of a lane set, or none

QF_INLINE vf set1(float x) { return {vdupq_n_f32(x)}; }
QF_INLINE vi set1(int32_t x) { return {vdupq_n_s32(x)}; }
QF_INLINE vf load(const float *p) { return {vld1q_f32(p)}; }
QF_INLINE vi load(const int32_t *p) { return {vld1q_s32(p)}; }
QF_INLINE vi load(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, 4);
    return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(word)))))};
}
QF_INLINE void store(float *p, vf a) { vst1q_f32(p, a.v); }
QF_INLINE void store(int32_t *p, vi a) { vst1q_s32(p, a.v); }
QF_INLINE void stream(float *p, vf a) { store(p, a); }
QF_INLINE void stream_end() {}
QF_INLINE vi lane_index() { const int32_t i[4] = {0, 1, 2, 3}; return {vld1q_s32(i)}; }

QF_INLINE vf operator+(vf a, vf b) { return {vaddq_f32(a.v, b.v)}; }
QF_INLINE vf operator-(vf a, vf b) { return {vsubq_f32(a.v, b.v)}; }
QF_INLINE vf operator*(vf a, vf b) { return {vmulq_f32(a.v, b.v)}; }
QF_INLINE vf operator/(vf a, vf b) { return {vdivq_f32(a.v, b.v)}; }
QF_INLINE vf operator-(vf a) { return {vnegq_f32(a.v)}; }
QF_INLINE vf fma(vf a, vf b, vf c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
QF_INLINE float total(vf a) { return vaddvq_f32(a.v); }
QF_INLINE vf sqrt(vf a) { return {vsqrtq_f32(a.v)}; }
QF_INLINE vf abs(vf a) { return {vabsq_f32(a.v)}; }
// not vminq: of equal zeros and of NaN the second is kept, as on x86
QF_INLINE vf min(vf a, vf b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
QF_INLINE vf max(vf a, vf b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }

QF_INLINE vi operator+(vi a, vi b) { return {vaddq_s32(a.v, b.v)}; }
QF_INLINE vi operator-(vi a, vi b) { return {vsubq_s32(a.v, b.v)}; }
QF_INLINE vi operator*(vi a, vi b) { return {vmulq_s32(a.v, b.v)}; }
QF_INLINE vi operator&(vi a, vi b) { return {vandq_s32(a.v, b.v)}; }
QF_INLINE vi operator|(vi a, vi b) { return {vorrq_s32(a.v, b.v)}; }
QF_INLINE vi operator^(vi a, vi b) { return {veorq_s32(a.v, b.v)}; }
template <int N> QF_INLINE vi shl(vi a) { return {vshlq_n_s32(a.v, N)}; }
template <int N> QF_INLINE vi shr(vi a) { return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v), N))}; }
template <int N> QF_INLINE vi sar(vi a) { return {vshrq_n_s32(a.v, N)}; }
QF_INLINE vi shl(vi a, vi n) { return {vshlq_s32(a.v, n.v)}; }
QF_INLINE vi shr(vi a, vi n) { return {vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.v), vnegq_s32(n.v)))}; }
QF_INLINE vi min(vi a, vi b) { return {vminq_s32(a.v, b.v)}; }
QF_INLINE vi max(vi a, vi b) { return {vmaxq_s32(a.v, b.v)}; }

QF_INLINE vm operator<(vf a, vf b) { return {vcltq_f32(a.v, b.v)}; }
QF_INLINE vm operator>(vf a, vf b) { return {vcgtq_f32(a.v, b.v)}; }
QF_INLINE vm operator<=(vf a, vf b) { return {vcleq_f32(a.v, b.v)}; }
QF_INLINE vm operator>=(vf a, vf b) { return {vcgeq_f32(a.v, b.v)}; }
QF_INLINE vm operator==(vf a, vf b) { return {vceqq_f32(a.v, b.v)}; }
QF_INLINE vm operator!=(vf a, vf b) { return {vmvnq_u32(vceqq_f32(a.v, b.v))}; }
QF_INLINE vm operator<(vi a, vi b) { return {vcltq_s32(a.v, b.v)}; }
QF_INLINE vm operator>(vi a, vi b) { return {vcgtq_s32(a.v, b.v)}; }
QF_INLINE vm operator==(vi a, vi b) { return {vceqq_s32(a.v, b.v)}; }
QF_INLINE vm operator!=(vi a, vi b) { return {vmvnq_u32(vceqq_s32(a.v, b.v))}; }
QF_INLINE vm operator&(vm a, vm b) { return {vandq_u32(a.v, b.v)}; }
QF_INLINE vm operator|(vm a, vm b) { return {vorrq_u32(a.v, b.v)}; }
QF_INLINE vm operator~(vm a) { return {vmvnq_u32(a.v)}; }
QF_INLINE vm all_lanes() { return {vdupq_n_u32(~0u)}; }
QF_INLINE bool any(vm a) { return vmaxvq_u32(a.v) != 0; }
QF_INLINE vf select(vm m, vf a, vf b) { return {vbslq_f32(m.v, a.v, b.v)}; }
QF_INLINE vi select(vm m, vi a, vi b) { return {vbslq_s32(m.v, a.v, b.v)}; }

QF_INLINE vf to_float(vi a) { return {vcvtq_f32_s32(a.v)}; }
// x86 makes INT32_MIN of NaN and of what is out of range, where NEON saturates
QF_INLINE vi in_range(vf a, int32x4_t r) {
    return {vbslq_s32(vcltq_f32(vabsq_f32(a.v), vdupq_n_f32(2147483648.0f)), r, vdupq_n_s32(INT32_MIN))};
}
QF_INLINE vi truncate(vf a) { return in_range(a, vcvtq_s32_f32(a.v)); }
QF_INLINE vi round_even(vf a) { return in_range(a, vcvtnq_s32_f32(a.v)); }
QF_INLINE vi as_int(vf a) { return {vreinterpretq_s32_f32(a.v)}; }
QF_INLINE vf as_float(vi a) { return {vreinterpretq_f32_s32(a.v)}; }
QF_INLINE vi to_half(vf a) { return {vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32(a.v))))}; }
QF_INLINE vf from_half(vi a) { return {vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(vreinterpretq_u32_s32(a.v))))}; }
QF_INLINE vf gather(const float *p, vi i) {
    const float r[4] = {p[vgetq_lane_s32(i.v, 0)], p[vgetq_lane_s32(i.v, 1)], p[vgetq_lane_s32(i.v, 2)], p[vgetq_lane_s32(i.v, 3)]};
    return load(r);
}
QF_INLINE vi gather(const int32_t *p, vi i) {
    const int32_t r[4] = {p[vgetq_lane_s32(i.v, 0)], p[vgetq_lane_s32(i.v, 1)], p[vgetq_lane_s32(i.v, 2)], p[vgetq_lane_s32(i.v, 3)]};
    return load(r);
}
QF_INLINE vf lookup16(const float *table, vi i) { return gather(table, i); }
QF_INLINE vi widen_i8(const uint8_t *p) { return sar<24>(shl<24>(load(p))); }
QF_INLINE vi widen_u16(const uint8_t *p) { return {vreinterpretq_s32_u32(vmovl_u16(vld1_u16((const uint16_t *)p)))}; }
QF_INLINE void narrow_u16(uint8_t *p, vi a) { vst1_u16((uint16_t *)p, vmovn_u32(vreinterpretq_u32_s32(a.v))); }

QF_INLINE void transpose_in(const float *const *src, int n, float *dst) {
    for (int i = 0; i < n; i += 4) {
        const float32x4x2_t a = vtrnq_f32(vld1q_f32(src[0] + i), vld1q_f32(src[1] + i));
        const float32x4x2_t b = vtrnq_f32(vld1q_f32(src[2] + i), vld1q_f32(src[3] + i));
        vst1q_f32(dst + (i + 0) * 4, vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0])));
        vst1q_f32(dst + (i + 1) * 4, vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1])));
        vst1q_f32(dst + (i + 2) * 4, vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0])));
        vst1q_f32(dst + (i + 3) * 4, vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1])));
    }
}
