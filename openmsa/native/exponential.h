// exp and log for vectors. exp(-inf) is exactly 0, NaN stays NaN.
#pragma once
#include "simd.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

// 2^x to about 2^-22: for weights that are rounded to bf16 next. x at most 127.
OPENMSA_INLINE V exp2_rough(V x) {
  x = max(all(LOWEST_POWER), x);  // in this order a NaN stays
  V n = round(x), f = sub(x, n);
  V p = fma(all(1.3333558e-3f), f, all(9.6181291e-3f));
  p = fma(p, f, all(5.5504109e-2f));
  p = fma(p, f, all(2.4022651e-1f));
  p = fma(p, f, all(6.9314718e-1f));
  return scale2(fma(p, f, all(1.0f)), n);
}

// e^x to about the last place. x at most 88.
OPENMSA_INLINE V exp_exact(V x) {
  x = max(all(LOWEST_POWER * LN2), x);
  V n = round(mul(x, all(LOG2E)));
  V f = fma(n, all(-0.693359375f), x);  // ln 2 in two parts, the first exact
  f = fma(n, all(2.12194440e-4f), f);
  V p = fma(all(1.9875691500e-4f), f, all(1.3981999507e-3f));
  p = fma(p, f, all(8.3334519073e-3f));
  p = fma(p, f, all(4.1665795894e-2f));
  p = fma(p, f, all(1.6666665459e-1f));
  p = fma(p, f, all(5.0000001201e-1f));
  p = fma(mul(f, f), p, add(f, all(1.0f)));
  return scale2(p, n);
}

// e^x where x comes as x * log2(e) in a product of pairs and as x itself in one of floats: multiply the
// scores by `scale * EXP_UNIT<Unit>` and take exp_of<Unit>.
template <class Unit>
constexpr float EXP_UNIT = UnitOf<Unit>::width == 2 ? LOG2E : 1.0f;
template <class Unit>
OPENMSA_INLINE V exp_of(V x) {
  if constexpr (UnitOf<Unit>::width == 2)
    return exp2_rough(x);
  else
    return exp_exact(x);
}

// ln x to about the last place, for x from the smallest normal number up. Not for NaN.
OPENMSA_INLINE V log_exact(V x) {
  typedef int32_t Ints __attribute__((vector_size(sizeof(V))));
  const Ints bits = (Ints)x, power = (bits - 0x3f3504f3) >> 23;  // x / 2^power in sqrt(1/2) .. sqrt(2)
  const V n = __builtin_convertvector(power, V), f = sub((V)(bits - (power << 23)), all(1.0f));
  V p = fma(all(7.0376836292e-2f), f, all(-1.1514610310e-1f));
  p = fma(p, f, all(1.1676998740e-1f));
  p = fma(p, f, all(-1.2420140846e-1f));
  p = fma(p, f, all(1.4249322787e-1f));
  p = fma(p, f, all(-1.6668057665e-1f));
  p = fma(p, f, all(2.0000714765e-1f));
  p = fma(p, f, all(-2.4999993993e-1f));
  p = fma(p, f, all(3.3333331174e-1f));
  const V square = mul(f, f);
  p = fma(mul(p, f), square, mul(n, all(-2.12194440e-4f)));
  p = fma(all(-0.5f), square, p);
  return fma(n, all(0.693359375f), add(f, p));
}

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
