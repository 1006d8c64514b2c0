// Vectors of W floats for the instruction set that this object is built for, and what is common to all.
//
// A product contracts over UNITS: one float, or a pair of bf16 in 32 bits where the machine multiplies
// pairs (vdpbf16ps). Both are 4 bytes wide, so panels of either are moved by the same code.
// Everything lies in an unnamed namespace: an object for one machine must leave nothing that the linker
// could choose for another.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"

#define OPENMSA_INLINE static inline __attribute__((always_inline))

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

using Pair = uint32_t;

template <class Unit>
struct UnitOf;
template <>
struct UnitOf<float> {
  static constexpr int width = 1;
};
template <>
struct UnitOf<Pair> {
  static constexpr int width = 2;
};

// Columns of packed panels come in multiples of this, whatever W is.
constexpr int64_t PAD = 16;

OPENMSA_INLINE int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }
template <class Unit>
OPENMSA_INLINE int64_t units(int64_t n) {
  return (n + UnitOf<Unit>::width - 1) / UnitOf<Unit>::width;
}
OPENMSA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
OPENMSA_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

OPENMSA_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
OPENMSA_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
constexpr float INF = __builtin_inff();

// Not finite, read from the bits: no compiler option can take it away.
OPENMSA_INLINE bool spoilt(float x) { return (bits_of(x) & 0x7f800000u) == 0x7f800000u; }

OPENMSA_INLINE float from_bf16(uint16_t x) { return float_of(uint32_t(x) << 16); }
OPENMSA_INLINE uint16_t to_bf16(float x) {
  uint32_t bits = bits_of(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);  // NaN stays NaN
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// Half precision by integers: a subnormal is exact once multiplied up; an overflow is infinite.
OPENMSA_INLINE float from_f16(uint16_t x) {
  uint32_t sign = uint32_t(x & 0x8000) << 16, rest = x & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | (rest & 0x3ff) << 13);
  if (rest < 0x400) return float_of(sign | bits_of(float(rest) * 0x1p-24f));
  return float_of(sign | ((rest << 13) + 0x38000000u));
}
OPENMSA_INLINE uint16_t to_f16(float x) {
  uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00);
  if (rest < 0x38800000u)  // adding 0.5 rounds at 2^-24, the last place of a subnormal
    return uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000u));
  rest += 0xc8000fffu + (rest >> 13 & 1);
  return uint16_t(sign | rest >> 13);
}

OPENMSA_INLINE int64_t bytes_of(Kind kind) { return kind == Kind::f32 ? 4 : 2; }
OPENMSA_INLINE float read(const void* data, Kind kind, int64_t i) {
  if (kind == Kind::f32) return static_cast<const float*>(data)[i];
  uint16_t x = static_cast<const uint16_t*>(data)[i];
  return kind == Kind::bf16 ? from_bf16(x) : from_f16(x);
}
OPENMSA_INLINE void write(void* data, Kind kind, int64_t i, float x) {
  if (kind == Kind::f32)
    static_cast<float*>(data)[i] = x;
  else
    static_cast<uint16_t*>(data)[i] = kind == Kind::bf16 ? to_bf16(x) : to_f16(x);
}

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif
