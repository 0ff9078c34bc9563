// 4 W bytes as W words of four, for products of bytes. Included after a vec_*.h.
//
// Blocks of sixteen bytes lie one after the other in memory; `transpose` takes W of them, in four vectors, so that a
// lane holds a quarter of the same block in each: what `dot` adds up in a lane is one block's product. Lane l then has
// block `block_of(l)`, which is what `by_lane` does to W numbers, one for each block.
#pragma once

#if W == 16
struct vb { __m512i v; };
QF_INLINE vb load_bytes(const void *p) { return {_mm512_loadu_si512(p)}; }
QF_INLINE void store_bytes(void *p, vb a) { _mm512_storeu_si512(p, a.v); }
QF_INLINE vb flip_high(vb a) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8((char)0x80))}; }
QF_INLINE vf by_lane(vf a) {
    return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), a.v)};
}
QF_INLINE void transpose(vb *a) {
    const __m512i p = _mm512_unpacklo_epi32(a[0].v, a[1].v), q = _mm512_unpackhi_epi32(a[0].v, a[1].v);
    const __m512i r = _mm512_unpacklo_epi32(a[2].v, a[3].v), s = _mm512_unpackhi_epi32(a[2].v, a[3].v);
    a[0].v = _mm512_unpacklo_epi64(p, r), a[1].v = _mm512_unpackhi_epi64(p, r);
    a[2].v = _mm512_unpacklo_epi64(q, s), a[3].v = _mm512_unpackhi_epi64(q, s);
}
QF_INLINE __m512i pair_products(vb w, const void *x) { return _mm512_maddubs_epi16(w.v, _mm512_loadu_si512(x)); }
QF_INLINE __m512i signed_products(vb w, const void *x) {
    const __m512i v = _mm512_loadu_si512(x);
    const __m512i turned = _mm512_mask_sub_epi8(v, _mm512_movepi8_mask(w.v), _mm512_setzero_si512(), v);
    return _mm512_maddubs_epi16(_mm512_abs_epi8(w.v), turned);
}
QF_INLINE __m512i add_pairs(__m512i a, __m512i b) { return _mm512_add_epi16(a, b); }
QF_INLINE vi widen_pairs(__m512i a) { return {_mm512_madd_epi16(a, _mm512_set1_epi16(1))}; }
#elif W == 8
struct vb { __m256i v; };
QF_INLINE vb load_bytes(const void *p) { return {_mm256_loadu_si256((const __m256i *)p)}; }
QF_INLINE void store_bytes(void *p, vb a) { _mm256_storeu_si256((__m256i *)p, a.v); }
QF_INLINE vb flip_high(vb a) { return {_mm256_xor_si256(a.v, _mm256_set1_epi8((char)0x80))}; }
QF_INLINE vf by_lane(vf a) { return {_mm256_permutevar8x32_ps(a.v, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7))}; }
QF_INLINE void transpose(vb *a) {
    const __m256i p = _mm256_unpacklo_epi32(a[0].v, a[1].v), q = _mm256_unpackhi_epi32(a[0].v, a[1].v);
    const __m256i r = _mm256_unpacklo_epi32(a[2].v, a[3].v), s = _mm256_unpackhi_epi32(a[2].v, a[3].v);
    a[0].v = _mm256_unpacklo_epi64(p, r), a[1].v = _mm256_unpackhi_epi64(p, r);
    a[2].v = _mm256_unpacklo_epi64(q, s), a[3].v = _mm256_unpackhi_epi64(q, s);
}
QF_INLINE __m256i pair_products(vb w, const void *x) { return _mm256_maddubs_epi16(w.v, _mm256_loadu_si256((const __m256i *)x)); }
QF_INLINE __m256i signed_products(vb w, const void *x) {
    return _mm256_maddubs_epi16(_mm256_abs_epi8(w.v), _mm256_sign_epi8(_mm256_loadu_si256((const __m256i *)x), w.v));
}
QF_INLINE __m256i add_pairs(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
QF_INLINE vi widen_pairs(__m256i a) { return {_mm256_madd_epi16(a, _mm256_set1_epi16(1))}; }
#elif W == 4
struct vb { int8x16_t v; };
QF_INLINE vb load_bytes(const void *p) { return {vld1q_s8((const int8_t *)p)}; }
QF_INLINE void store_bytes(void *p, vb a) { vst1q_s8((int8_t *)p, a.v); }
QF_INLINE vb flip_high(vb a) { return {veorq_s8(a.v, vdupq_n_s8(INT8_MIN))}; }
QF_INLINE vf by_lane(vf a) { return a; }
QF_INLINE void transpose(vb *a) {
    const int32x4x2_t p = vzipq_s32(vreinterpretq_s32_s8(a[0].v), vreinterpretq_s32_s8(a[2].v));
    const int32x4x2_t q = vzipq_s32(vreinterpretq_s32_s8(a[1].v), vreinterpretq_s32_s8(a[3].v));
    for (int i = 0; i < 2; i++) {
        const int32x4x2_t r = vzipq_s32(p.val[i], q.val[i]);
        a[2 * i].v = vreinterpretq_s8_s32(r.val[0]), a[2 * i + 1].v = vreinterpretq_s8_s32(r.val[1]);
    }
}
QF_INLINE int16x8_t signed_products(vb w, const void *p) {
    const int8x16_t x = vld1q_s8((const int8_t *)p);
    return vpaddq_s16(vmull_s8(vget_low_s8(w.v), vget_low_s8(x)), vmull_s8(vget_high_s8(w.v), vget_high_s8(x)));
}
QF_INLINE int16x8_t pair_products(vb w, const void *x) { return signed_products(w, x); }
QF_INLINE int16x8_t add_pairs(int16x8_t a, int16x8_t b) { return vaddq_s16(a, b); }
QF_INLINE vi widen_pairs(int16x8_t a) { return {vpaddlq_s16(a)}; }
#else
struct vb { int8_t v[4]; };
QF_INLINE vb load_bytes(const void *p) { vb a; memcpy(a.v, p, 4); return a; }
QF_INLINE void store_bytes(void *p, vb a) { memcpy(p, a.v, 4); }
QF_INLINE vb flip_high(vb a) { for (int i = 0; i < 4; i++) a.v[i] = (int8_t)(a.v[i] ^ 0x80); return a; }
QF_INLINE vf by_lane(vf a) { return a; }
QF_INLINE void transpose(vb *) {}
QF_INLINE int32_t signed_products(vb w, const void *p) {
    const int8_t *x = (const int8_t *)p;
    return w.v[0] * x[0] + w.v[1] * x[1] + w.v[2] * x[2] + w.v[3] * x[3];
}
QF_INLINE int32_t pair_products(vb w, const void *x) { return signed_products(w, x); }
QF_INLINE int32_t add_pairs(int32_t a, int32_t b) { return a + b; }
QF_INLINE vi widen_pairs(int32_t a) { return {a}; }
#endif
