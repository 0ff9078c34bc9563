// Eight lanes.
#pragma once

#include "common.h"
#define W 8

struct vf { __m256 v; };
struct vi { __m256i v; };
struct vm { __m256 v; };  // all bits of a lane set, or none

QF_INLINE vf set1(float x) { return {_mm256_set1_ps(x)}; }
QF_INLINE vi set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
QF_INLINE vf load(const float *p) { return {_mm256_loadu_ps(p)}; }
QF_INLINE vi load(const int32_t *p) { return {_mm256_loadu_si256((const __m256i *)p)}; }
QF_INLINE vi load(const uint8_t *p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))}; }
QF_INLINE void store(float *p, vf a) { _mm256_storeu_ps(p, a.v); }
QF_INLINE void store(int32_t *p, vi a) { _mm256_storeu_si256((__m256i *)p, a.v); }
// past the cache, to an aligned address; stream_end orders it before what other threads read
QF_INLINE void stream(float *p, vf a) { _mm256_stream_ps(p, a.v); }
QF_INLINE void stream_end() { _mm_sfence(); }
QF_INLINE vi lane_index() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }

QF_INLINE vf operator+(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
QF_INLINE vf operator-(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
QF_INLINE vf operator*(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
QF_INLINE vf operator/(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
QF_INLINE vf operator-(vf a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
QF_INLINE vf fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
QF_INLINE float total(vf a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
QF_INLINE vf sqrt(vf a) { return {_mm256_sqrt_ps(a.v)}; }
QF_INLINE vf abs(vf a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
QF_INLINE vf min(vf a, vf b) { return {_mm256_min_ps(a.v, b.v)}; }
QF_INLINE vf max(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }

QF_INLINE vi operator+(vi a, vi b) { return {_mm256_add_epi32(a.v, b.v)}; }
QF_INLINE vi operator-(vi a, vi b) { return {_mm256_sub_epi32(a.v, b.v)}; }
QF_INLINE vi operator*(vi a, vi b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
QF_INLINE vi operator&(vi a, vi b) { return {_mm256_and_si256(a.v, b.v)}; }
QF_INLINE vi operator|(vi a, vi b) { return {_mm256_or_si256(a.v, b.v)}; }
QF_INLINE vi operator^(vi a, vi b) { return {_mm256_xor_si256(a.v, b.v)}; }
template <int N> QF_INLINE vi shl(vi a) { return {_mm256_slli_epi32(a.v, N)}; }
template <int N> QF_INLINE vi shr(vi a) { return {_mm256_srli_epi32(a.v, N)}; }
template <int N> QF_INLINE vi sar(vi a) { return {_mm256_srai_epi32(a.v, N)}; }
QF_INLINE vi shl(vi a, vi n) { return {_mm256_sllv_epi32(a.v, n.v)}; }
QF_INLINE vi shr(vi a, vi n) { return {_mm256_srlv_epi32(a.v, n.v)}; }
QF_INLINE vi min(vi a, vi b) { return {_mm256_min_epi32(a.v, b.v)}; }
QF_INLINE vi max(vi a, vi b) { return {_mm256_max_epi32(a.v, b.v)}; }

QF_INLINE vm operator<(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
QF_INLINE vm operator>(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
QF_INLINE vm operator<=(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
QF_INLINE vm operator>=(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
QF_INLINE vm operator==(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
QF_INLINE vm operator!=(vf a, vf b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)}; }
QF_INLINE vm operator<(vi a, vi b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))}; }
QF_INLINE vm operator>(vi a, vi b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.v, b.v))}; }
QF_INLINE vm operator==(vi a, vi b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
QF_INLINE vm all_lanes() { return {_mm256_castsi256_ps(_mm256_set1_epi32(-1))}; }
QF_INLINE vm operator~(vm a) { return {_mm256_xor_ps(a.v, all_lanes().v)}; }
QF_INLINE vm operator!=(vi a, vi b) { return ~(a == b); }
QF_INLINE vm operator&(vm a, vm b) { return {_mm256_and_ps(a.v, b.v)}; }
QF_INLINE vm operator|(vm a, vm b) { return {_mm256_or_ps(a.v, b.v)}; }
QF_INLINE bool any(vm a) { return _mm256_movemask_ps(a.v) != 0; }
QF_INLINE vf select(vm m, vf a, vf b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
QF_INLINE vi select(vm m, vi a, vi b) {
    return {_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(b.v), _mm256_castsi256_ps(a.v), m.v))};
}

QF_INLINE vf to_float(vi a) { return {_mm256_cvtepi32_ps(a.v)}; }
QF_INLINE vi truncate(vf a) { return {_mm256_cvttps_epi32(a.v)}; }
QF_INLINE vi round_even(vf a) { return {_mm256_cvtps_epi32(a.v)}; }
QF_INLINE vi as_int(vf a) { return {_mm256_castps_si256(a.v)}; }
QF_INLINE vf as_float(vi a) { return {_mm256_castsi256_ps(a.v)}; }
QF_INLINE vi to_half(vf a) {
    return {_mm256_cvtepu16_epi32(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
QF_INLINE vf from_half(vi a) {
    const __m256i p = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.v, a.v), 0x08);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(p))};
}
QF_INLINE vf gather(const float *p, vi i) { return {_mm256_i32gather_ps(p, i.v, 4)}; }
QF_INLINE vi gather(const int32_t *p, vi i) { return {_mm256_i32gather_epi32(p, i.v, 4)}; }
QF_INLINE vf lookup16(const float *table, vi i) {
    const __m256 lo = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i.v), hi = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i.v);
    return {_mm256_blendv_ps(lo, hi, _mm256_castsi256_ps(_mm256_slli_epi32(i.v, 28)))};
}
QF_INLINE vi widen_i8(const uint8_t *p) { return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))}; }
QF_INLINE vi widen_u16(const uint8_t *p) { return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p))}; }
QF_INLINE void narrow_u16(uint8_t *p, vi a) {
    const __m256i h = _mm256_permute4x64_epi64(_mm256_packus_epi32(a.v, a.v), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(h));
}

QF_INLINE void transpose_in(const float *const *src, int n, float *dst) {
    for (int i = 0; i < n; i += 8) {
        __m256 r[8], a[8], b[8];
        for (int k = 0; k < 8; k++) r[k] = _mm256_loadu_ps(src[k] + i);
        for (int k = 0; k < 4; k++) {
            a[2 * k] = _mm256_unpacklo_ps(r[2 * k], r[2 * k + 1]);
            a[2 * k + 1] = _mm256_unpackhi_ps(r[2 * k], r[2 * k + 1]);
        }
        for (int k = 0; k < 2; k++)
            for (int j = 0; j < 2; j++) {
                b[4 * k + 2 * j] = _mm256_shuffle_ps(a[4 * k + j], a[4 * k + j + 2], 0x44);
                b[4 * k + 2 * j + 1] = _mm256_shuffle_ps(a[4 * k + j], a[4 * k + j + 2], 0xee);
            }
        for (int c = 0; c < 4; c++) {
            _mm256_storeu_ps(dst + (i + c) * 8, _mm256_permute2f128_ps(b[c], b[c + 4], 0x20));
            _mm256_storeu_ps(dst + (i + 4 + c) * 8, _mm256_permute2f128_ps(b[c], b[c + 4], 0x31));
        }
    }
}
