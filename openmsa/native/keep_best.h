// The best blocks of one row of scores: forced blocks, then score descending and number ascending.
#pragma once
#include "simd.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

// Whole numbers in the order of the floats that they stand for.
inline int32_t order(float x) {
  const int32_t bits = int32_t(bits_of(x));
  return bits ^ (bits >> 31 & 0x7fffffff);
}
inline float number(int32_t x) { return float_of(uint32_t(x ^ (x >> 31 & 0x7fffffff))); }

// Up to 64 numbers: bit i says x[i] > edge.
inline uint64_t above(const float* x, V edge) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += W) bits |= uint64_t(greater(load(x + i), edge)) << i;
  return bits;
}
inline uint64_t below(const float* x, V edge) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += W) bits |= uint64_t(greater(edge, load(x + i))) << i;
  return bits;
}

// The k best of n > k numbers: all above `value`, and the first `equal` of those that equal it.
struct Edge {
  float value;
  int64_t equal;
};
// x continues with -inf to a multiple of 64. Halves the interval: more than k numbers lie above `low`, fewer
// than k above `high`. Means come first, for they soon part the k best from the rest; then floats are
// counted, which ends for any.
inline Edge find_edge(const float* x, int64_t n, int64_t k) {
  V most = all(-INF), least = all(-INF);
  for (int64_t i = 0; i < n; i += W) {
    const V some = load(x + i);
    most = max(some, most);
    least = max(first(sub(zero(), some), n - i, all(-INF)), least);
  }
  int32_t low = order(-max_of(least)) - 1, high = order(max_of(most));
  int64_t above_high = 0;
  for (int round = 0; int64_t(high) - low > 1; ++round) {
    int32_t middle = order(0.5f * number(low) + 0.5f * number(high));
    if (round >= 16 || middle <= low || middle >= high) middle = int32_t((int64_t(low) + high) >> 1);
    const V edge = all(number(middle));
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 64) count += __builtin_popcountll(above(x + i, edge));
    if (count == k) return {number(middle), 0};
    if (count > k)
      low = middle;
    else
      high = middle, above_high = count;
  }
  return {number(high), k - above_high};
}

// Writes the numbers of the k best of x[0 .. n), the first of which is `from`, ascending.
inline int32_t* write_best(const float* x, int64_t n, int64_t k, int64_t from, int32_t* to) {
  if (n <= k) {
    for (int64_t i = 0; i < n; ++i) *to++ = int32_t(from + i);
    return to;
  }
  if (k <= 0) return to;
  Edge edge = find_edge(x, n, k);
  const V value = all(edge.value);
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t bits = above(x + i, value);
    if (edge.equal) {
      uint64_t equal = ~(bits | below(x + i, value));
      if (n - i < 64) equal &= (uint64_t(1) << (n - i)) - 1;
      for (; equal && edge.equal; --edge.equal, equal &= equal - 1) bits |= equal & -equal;
    }
    for (; bits; bits &= bits - 1) *to++ = int32_t(from + i + __builtin_ctzll(bits));
  }
  return to;
}

// One row's answer: x holds the scores of the blocks up to its own, with room for 64 more.
inline void choose(const SelectArguments& a, float* x, int64_t own, int32_t* to) {
  const int64_t sink = smaller(a.sink_blocks, own + 1), local = larger(sink, own + 1 - a.local_blocks);
  int32_t* end = to + a.top_k;
  for (int64_t i = 0; i < 64; ++i) x[local + i] = -INF;
  for (int64_t j = 0; j < sink; ++j) *to++ = int32_t(j);
  to = write_best(x + sink, local - sink, a.top_k - sink - (own + 1 - local), sink, to);
  for (int64_t j = local; j <= own; ++j) *to++ = int32_t(j);
  while (to < end) *to++ = -1;
}

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
