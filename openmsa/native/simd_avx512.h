// AVX-512: 16 floats; with AVX-512-BF16 also products of pairs.
#pragma once
#include <immintrin.h>

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

constexpr int64_t W = 16;
// Shapes of the micro-kernel: rows times vectors of columns, as many sums as registers hold.
constexpr int WIDE = 4, WIDE_ROWS = 6, NARROW_ROWS = 12;

using V = __m512;

OPENMSA_INLINE V zero() { return _mm512_setzero_ps(); }
OPENMSA_INLINE V all(float x) { return _mm512_set1_ps(x); }
OPENMSA_INLINE V load(const float* x) { return _mm512_loadu_ps(x); }
OPENMSA_INLINE void store(float* to, V x) { _mm512_storeu_ps(to, x); }
OPENMSA_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
OPENMSA_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
OPENMSA_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
OPENMSA_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// b where a is NaN.
OPENMSA_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
OPENMSA_INLINE float sum_of(V x) { return _mm512_reduce_add_ps(x); }
OPENMSA_INLINE float max_of(V x) { return _mm512_reduce_max_ps(x); }
// Bit i: a > b in lane i.
OPENMSA_INLINE uint32_t greater(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
// Lane i: the sum of x[i].
OPENMSA_INLINE V sums_of(const V (&x)[16]) {
  V y[8], z[4];
  for (int i = 0; i < 8; ++i)
    y[i] = add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; ++i)
    z[i] = add(_mm512_shuffle_ps(y[2 * i], y[2 * i + 1], 0x44), _mm512_shuffle_ps(y[2 * i], y[2 * i + 1], 0xee));
  for (int i = 0; i < 2; ++i)
    y[i] = add(_mm512_shuffle_f32x4(z[2 * i], z[2 * i + 1], 0x88), _mm512_shuffle_f32x4(z[2 * i], z[2 * i + 1], 0xdd));
  return add(_mm512_shuffle_f32x4(y[0], y[1], 0x88), _mm512_shuffle_f32x4(y[0], y[1], 0xdd));
}
// x in the first n lanes, `other` in the rest; n may be anything.
OPENMSA_INLINE V first(V x, int64_t n, V other) {
  __mmask16 mask = n <= 0 ? 0 : n >= 16 ? 0xffff : __mmask16((1u << n) - 1);
  return _mm512_mask_mov_ps(other, mask, x);
}
// x where a <= b, `other` elsewhere.
OPENMSA_INLINE V where_le(V a, V b, V x, V other) {
  return _mm512_mask_mov_ps(other, _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), x);
}
OPENMSA_INLINE V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// p * 2^n for whole n; 0 below the range.
OPENMSA_INLINE V scale2(V p, V n) { return _mm512_scalef_ps(p, n); }
constexpr float LOWEST_POWER = -200.0f;

OPENMSA_INLINE V load_bf16(const uint16_t* x) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}
OPENMSA_INLINE V load_f16(const uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
}
OPENMSA_INLINE void store_f16(uint16_t* to, V x) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
OPENMSA_INLINE void store_bf16(uint16_t* to, V x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x));
#else
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  near = _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16)));
#endif
}

// A row of units, one unit in every lane, and sum += a * b over the elements of a unit.
OPENMSA_INLINE V spread(const float* a) { return _mm512_set1_ps(*a); }
OPENMSA_INLINE V lanes(const float* b) { return _mm512_loadu_ps(b); }
OPENMSA_INLINE V dot(V sum, V a, V b) { return _mm512_fmadd_ps(a, b, sum); }
#if defined(__AVX512BF16__)
#define OPENMSA_PAIRS 1
OPENMSA_INLINE __m512bh spread(const Pair* a) { return (__m512bh)_mm512_set1_epi32(int(*a)); }
OPENMSA_INLINE __m512bh lanes(const Pair* b) { return (__m512bh)_mm512_loadu_si512(b); }
OPENMSA_INLINE V dot(V sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
#endif

// 16 rows of 16 units, `from` apart -> 16 rows `to` apart.
OPENMSA_INLINE void transpose16(const uint32_t* x, int64_t from, uint32_t* y, int64_t to) {
  __m512i r[16], s[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(x + i * from);
  for (int i = 0; i < 8; ++i) {
    s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(s[4 * i], s[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(s[4 * i], s[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(s[4 * i + 1], s[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(s[4 * i + 1], s[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    s[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    s[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    s[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    s[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(y + i * to, _mm512_shuffle_i32x4(s[i], s[8 + i], 0x88));
    _mm512_storeu_si512(y + (4 + i) * to, _mm512_shuffle_i32x4(s[4 + i], s[12 + i], 0x88));
    _mm512_storeu_si512(y + (8 + i) * to, _mm512_shuffle_i32x4(s[i], s[8 + i], 0xdd));
    _mm512_storeu_si512(y + (12 + i) * to, _mm512_shuffle_i32x4(s[4 + i], s[12 + i], 0xdd));
  }
}

// Rows a and b of 16 bf16 -> 16 pairs (a, b).
OPENMSA_INLINE void interleave16(const uint16_t* a, const uint16_t* b, uint32_t* to) {
  __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a));
  __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
