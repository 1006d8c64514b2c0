// AVX2 with FMA and F16C: 8 floats.
#pragma once
#include <immintrin.h>

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

constexpr int64_t W = 8;
constexpr int WIDE = 2, WIDE_ROWS = 6, NARROW_ROWS = 6;

using V = __m256;

OPENMSA_INLINE V zero() { return _mm256_setzero_ps(); }
OPENMSA_INLINE V all(float x) { return _mm256_set1_ps(x); }
OPENMSA_INLINE V load(const float* x) { return _mm256_loadu_ps(x); }
OPENMSA_INLINE void store(float* to, V x) { _mm256_storeu_ps(to, x); }
OPENMSA_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
OPENMSA_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
OPENMSA_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
OPENMSA_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
// b where a is NaN.
OPENMSA_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
OPENMSA_INLINE float sum_of(V x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
OPENMSA_INLINE float max_of(V x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
// Bit i: a > b in lane i.
OPENMSA_INLINE uint32_t greater(V a, V b) { return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ))); }
// Lane i: the sum of x[i].
OPENMSA_INLINE V sums_of(const V (&x)[8]) {
  V y[2];
  for (int i = 0; i < 2; ++i)
    y[i] = _mm256_hadd_ps(_mm256_hadd_ps(x[4 * i], x[4 * i + 1]), _mm256_hadd_ps(x[4 * i + 2], x[4 * i + 3]));
  return add(_mm256_permute2f128_ps(y[0], y[1], 0x20), _mm256_permute2f128_ps(y[0], y[1], 0x31));
}
// x in the first n lanes, `other` in the rest; n may be anything.
OPENMSA_INLINE V first(V x, int64_t n, V other) {
  int32_t lanes = n < 0 ? 0 : n > 8 ? 8 : int32_t(n);
  __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(mask));
}
// x where a <= b, `other` elsewhere.
OPENMSA_INLINE V where_le(V a, V b, V x, V other) {
  return _mm256_blendv_ps(other, x, _mm256_cmp_ps(a, b, _CMP_LE_OQ));
}
OPENMSA_INLINE V round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// p * 2^n for whole n from -127, which gives 0, to 127.
OPENMSA_INLINE V scale2(V p, V n) {
  __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
}
constexpr float LOWEST_POWER = -127.0f;

OPENMSA_INLINE V load_bf16(const uint16_t* x) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16));
}
OPENMSA_INLINE V load_f16(const uint16_t* x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)); }
OPENMSA_INLINE void store_f16(uint16_t* to, V x) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
OPENMSA_INLINE void store_bf16(uint16_t* to, V x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  near = _mm256_blendv_epi8(near, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  near = _mm256_srli_epi32(near, 16);
  near = _mm256_permute4x64_epi64(_mm256_packus_epi32(near, near), 0xd8);
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(near));
}

OPENMSA_INLINE V spread(const float* a) { return _mm256_broadcast_ss(a); }
OPENMSA_INLINE V lanes(const float* b) { return _mm256_loadu_ps(b); }
OPENMSA_INLINE V dot(V sum, V a, V b) { return _mm256_fmadd_ps(a, b, sum); }

OPENMSA_INLINE void transpose8(const uint32_t* x, int64_t from, uint32_t* y, int64_t to) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps((const float*)(x + i * from));
  for (int i = 0; i < 4; ++i) {
    s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps((float*)(y + i * to), _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
    _mm256_storeu_ps((float*)(y + (4 + i) * to), _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
  }
}
// 16 rows of 16 units, `from` apart -> 16 rows `to` apart.
OPENMSA_INLINE void transpose16(const uint32_t* x, int64_t from, uint32_t* y, int64_t to) {
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 16; j += 8) transpose8(x + i * from + j, from, y + j * to + i, to);
}

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
