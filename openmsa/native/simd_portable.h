// Any machine: 4 floats in the compiler's own vectors (SSE2, NEON, or plain instructions).
#pragma once

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

constexpr int64_t W = 4;
constexpr int WIDE = 4, WIDE_ROWS = 2, NARROW_ROWS = 2;

typedef float V __attribute__((vector_size(16)));
typedef int32_t Whole __attribute__((vector_size(16)));

OPENMSA_INLINE V all(float x) { return V{x, x, x, x}; }
OPENMSA_INLINE V zero() { return all(0.0f); }
OPENMSA_INLINE V load(const float* x) {
  V y;
  std::memcpy(&y, x, sizeof y);
  return y;
}
OPENMSA_INLINE void store(float* to, V x) { std::memcpy(to, &x, sizeof x); }
OPENMSA_INLINE V add(V a, V b) { return a + b; }
OPENMSA_INLINE V sub(V a, V b) { return a - b; }
OPENMSA_INLINE V mul(V a, V b) { return a * b; }
OPENMSA_INLINE V fma(V a, V b, V c) { return a * b + c; }
OPENMSA_INLINE V choose(Whole mask, V x, V other) { return (V)(((Whole)x & mask) | ((Whole)other & ~mask)); }
// b where a is NaN.
OPENMSA_INLINE V max(V a, V b) { return choose(a > b, a, b); }
OPENMSA_INLINE float sum_of(V x) { return (x[0] + x[2]) + (x[1] + x[3]); }
OPENMSA_INLINE float max_of(V x) {
  float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}
// Bit i: a > b in lane i.
OPENMSA_INLINE uint32_t greater(V a, V b) {
  Whole bits = (a > b) & Whole{1, 2, 4, 8};
  return uint32_t((bits[0] | bits[1]) | (bits[2] | bits[3]));
}
// Lane i: the sum of x[i].
OPENMSA_INLINE V sums_of(const V (&x)[4]) { return V{sum_of(x[0]), sum_of(x[1]), sum_of(x[2]), sum_of(x[3])}; }
// x in the first n lanes, `other` in the rest; n may be anything.
OPENMSA_INLINE V first(V x, int64_t n, V other) {
  int32_t lanes = n < 0 ? 0 : n > 4 ? 4 : int32_t(n);
  return choose(Whole{lanes, lanes, lanes, lanes} > Whole{0, 1, 2, 3}, x, other);
}
// x where a <= b, `other` elsewhere.
OPENMSA_INLINE V where_le(V a, V b, V x, V other) { return choose(a <= b, x, other); }
// Adding and taking away 1.5 * 2^23 rounds to whole numbers, for |x| < 2^22.
OPENMSA_INLINE V round(V x) {
  volatile float big = 12582912.0f;
  V shift = all(big);
  return (x + shift) - shift;
}
// p * 2^n for whole n from -127, which gives 0, to 127.
OPENMSA_INLINE V scale2(V p, V n) {
  return p * (V)((__builtin_convertvector(n, Whole) + 127) << 23);
}
constexpr float LOWEST_POWER = -127.0f;

OPENMSA_INLINE V load_bf16(const uint16_t* x) {
  typedef uint16_t Halves __attribute__((vector_size(8)));
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  return (V)(__builtin_convertvector(halves, Whole) << 16);
}
OPENMSA_INLINE V load_f16(const uint16_t* x) {
  return V{from_f16(x[0]), from_f16(x[1]), from_f16(x[2]), from_f16(x[3])};
}
OPENMSA_INLINE void store_bf16(uint16_t* to, V x) {
  for (int i = 0; i < 4; ++i) to[i] = to_bf16(x[i]);
}
OPENMSA_INLINE void store_f16(uint16_t* to, V x) {
  for (int i = 0; i < 4; ++i) to[i] = to_f16(x[i]);
}

OPENMSA_INLINE V spread(const float* a) { return all(*a); }
OPENMSA_INLINE V lanes(const float* b) { return load(b); }
OPENMSA_INLINE V dot(V sum, V a, V b) { return a * b + sum; }

// 16 rows of 16 units, `from` apart -> 16 rows `to` apart.
OPENMSA_INLINE void transpose16(const uint32_t* x, int64_t from, uint32_t* y, int64_t to) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) y[j * to + i] = x[i * from + j];
}

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
