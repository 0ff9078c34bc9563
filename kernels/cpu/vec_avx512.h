// Sixteen lanes.
#pragma once

#include "common.h"
#define W 16

struct vf { __m512 v; };
struct vi { __m512i v; };
struct vm { __mmask16 v; };

QF_INLINE vf set1(float x) { return {_mm512_set1_ps(x)}; }
QF_INLINE vi set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
QF_INLINE vf load(const float *p) { return {_mm512_loadu_ps(p)}; }
QF_INLINE vi load(const int32_t *p) { return {_mm512_loadu_si512(p)}; }
QF_INLINE vi load(const uint8_t *p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p))}; }
QF_INLINE void store(float *p, vf a) { _mm512_storeu_ps(p, a.v); }
QF_INLINE void store(int32_t *p, vi a) { _mm512_storeu_si512(p, a.v); }
// past the cache, to an aligned address; stream_end orders it before what other threads read
QF_INLINE void stream(float *p, vf a) { _mm512_stream_ps(p, a.v); }
QF_INLINE void stream_end() { _mm_sfence(); }
QF_INLINE vi lane_index() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }

QF_INLINE vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
QF_INLINE vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
QF_INLINE vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
QF_INLINE vf operator/(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
QF_INLINE vf operator-(vf a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
QF_INLINE vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
QF_INLINE float total(vf a) { return _mm512_reduce_add_ps(a.v); }
QF_INLINE vf sqrt(vf a) { return {_mm512_sqrt_ps(a.v)}; }
QF_INLINE vf abs(vf a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
QF_INLINE vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
QF_INLINE vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }

QF_INLINE vi operator+(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
QF_INLINE vi operator-(vi a, vi b) { return {_mm512_sub_epi32(a.v, b.v)}; }
QF_INLINE vi operator*(vi a, vi b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
QF_INLINE vi operator&(vi a, vi b) { return {_mm512_and_si512(a.v, b.v)}; }
QF_INLINE vi operator|(vi a, vi b) { return {_mm512_or_si512(a.v, b.v)}; }
QF_INLINE vi operator^(vi a, vi b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int N> QF_INLINE vi shl(vi a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> QF_INLINE vi shr(vi a) { return {_mm512_srli_epi32(a.v, N)}; }
template <int N> QF_INLINE vi sar(vi a) { return {_mm512_srai_epi32(a.v, N)}; }
QF_INLINE vi shl(vi a, vi n) { return {_mm512_sllv_epi32(a.v, n.v)}; }
QF_INLINE vi shr(vi a, vi n) { return {_mm512_srlv_epi32(a.v, n.v)}; }
QF_INLINE vi min(vi a, vi b) { return {_mm512_min_epi32(a.v, b.v)}; }
QF_INLINE vi max(vi a, vi b) { return {_mm512_max_epi32(a.v, b.v)}; }

QF_INLINE vm operator<(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
QF_INLINE vm operator>(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
QF_INLINE vm operator<=(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
QF_INLINE vm operator>=(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
QF_INLINE vm operator==(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
QF_INLINE vm operator!=(vf a, vf b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
QF_INLINE vm operator<(vi a, vi b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
QF_INLINE vm operator>(vi a, vi b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
QF_INLINE vm operator==(vi a, vi b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
QF_INLINE vm operator!=(vi a, vi b) { return {_mm512_cmpneq_epi32_mask(a.v, b.v)}; }
QF_INLINE vm operator&(vm a, vm b) { return {(__mmask16)(a.v & b.v)}; }
QF_INLINE vm operator|(vm a, vm b) { return {(__mmask16)(a.v | b.v)}; }
QF_INLINE vm operator~(vm a) { return {(__mmask16)~a.v}; }
QF_INLINE bool any(vm a) { return a.v != 0; }
QF_INLINE vm all_lanes() { return {(__mmask16)0xffff}; }
QF_INLINE vf select(vm m, vf a, vf b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
QF_INLINE vi select(vm m, vi a, vi b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }

QF_INLINE vf to_float(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
QF_INLINE vi truncate(vf a) { return {_mm512_cvttps_epi32(a.v)}; }
QF_INLINE vi round_even(vf a) { return {_mm512_cvtps_epi32(a.v)}; }
QF_INLINE vi as_int(vf a) { return {_mm512_castps_si512(a.v)}; }
QF_INLINE vf as_float(vi a) { return {_mm512_castsi512_ps(a.v)}; }
QF_INLINE vi to_half(vf a) {
    return {_mm512_cvtepu16_epi32(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}
QF_INLINE vf from_half(vi a) { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(a.v))}; }
QF_INLINE vf gather(const float *p, vi i) { return {_mm512_i32gather_ps(i.v, p, 4)}; }
QF_INLINE vi gather(const int32_t *p, vi i) { return {_mm512_i32gather_epi32(i.v, p, 4)}; }
QF_INLINE vf lookup16(const float *table, vi i) { return {_mm512_permutexvar_ps(i.v, _mm512_loadu_ps(table))}; }
QF_INLINE vi widen_i8(const uint8_t *p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))}; }
QF_INLINE vi widen_u16(const uint8_t *p) { return {_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p))}; }
QF_INLINE void narrow_u16(uint8_t *p, vi a) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(a.v)); }

QF_INLINE void transpose_in(const float *const *src, int n, float *dst) {
    for (int i = 0; i < n; i += 8) {
        __m512 r[8];  // r[k]: row k in the low half, row k+8 in the high half
        for (int k = 0; k < 8; k++)
            r[k] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(src[k] + i)), _mm256_loadu_ps(src[k + 8] + i), 1);
        __m512 a[8], b[8];
        for (int k = 0; k < 4; k++) {
            a[2 * k] = _mm512_unpacklo_ps(r[2 * k], r[2 * k + 1]);
            a[2 * k + 1] = _mm512_unpackhi_ps(r[2 * k], r[2 * k + 1]);
        }
        for (int k = 0; k < 2; k++)
            for (int j = 0; j < 2; j++) {
                b[4 * k + 2 * j] = _mm512_shuffle_ps(a[4 * k + j], a[4 * k + j + 2], 0x44);
                b[4 * k + 2 * j + 1] = _mm512_shuffle_ps(a[4 * k + j], a[4 * k + j + 2], 0xee);
            }
        // b[c], c < 4: 128-bit lane l of half h holds element 4l+c of rows 8h..8h+3; b[c+4]: rows 8h+4..8h+7
        for (int c = 0; c < 4; c++) {
            const __m512i lo = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
            const __m512i hi = _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
            _mm512_storeu_ps(dst + (i + c) * 16, _mm512_permutex2var_ps(b[c], lo, b[c + 4]));
            _mm512_storeu_ps(dst + (i + 4 + c) * 16, _mm512_permutex2var_ps(b[c], hi, b[c + 4]));
        }
    }
}
