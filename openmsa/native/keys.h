// Keys and values on their way from a tensor into panels: asked for early, read from where they lie, and
// watched for what is not finite.
#pragma once
#include "panels.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

// The keys and values of the next visit, asked for a few lines at a time while this one is worked on.
struct Ahead {
  const char* rows[2];
  int64_t step[2], lines[2], left, share, line, which;

  void begin(const View& k, const View& v, int64_t batch, int64_t token, int64_t head, int64_t n, int64_t times) {
    rows[0] = at(k, batch, token, head), step[0] = k.stride[1] * bytes_of(k.kind);
    rows[1] = at(v, batch, token, head), step[1] = v.stride[1] * bytes_of(v.kind);
    lines[0] = (k.size[3] * bytes_of(k.kind) + 63) / 64, lines[1] = (v.size[3] * bytes_of(v.kind) + 63) / 64;
    left = n * (lines[0] + lines[1]), share = left / larger(1, times) + 1;
    line = which = 0;
  }
  void ask() {
    for (int64_t i = smaller(share, left); i > 0; --i, --left) {
      __builtin_prefetch(rows[which] + line * 64, 0, 2);
      if (++line < lines[which]) continue;
      rows[which] += step[which];
      line = 0, which ^= 1;
    }
  }
};

// Finds what is not finite on the way: an exponent of ones plus one carries into the place above it.
template <class Unit>
struct Watch {
  typedef uint32_t Bits __attribute__((vector_size(64)));
  static constexpr uint32_t ones = UnitOf<Unit>::width == 2 ? 0x00800080u : 0x00800000u;
  Bits found{};
  inline void see(const Unit* x, int64_t lead) {
    for (int64_t j = 0; j < lead; j += 16) {
      Bits bits;
      std::memcpy(&bits, x + j, 64);
      found |= (bits & ones * 255) + ones;
    }
  }
  bool spoilt() const {
    uint32_t all = 0;
    for (int i = 0; i < 16; ++i) all |= found[i];
    return (all & ones << 8) != 0;
  }
};

// As `turn`, with rows that need not be dense; true: something is not finite.
template <class Unit>
inline bool turn_watched(Unit* rows, int64_t step, int64_t n, int64_t lead, Unit* to) {
  const int64_t columns = padded(n);
  if (columns > n) std::memset(static_cast<void*>(rows + n * step), 0, size_t((columns - n) * step) * 4);
  Watch<Unit> watch;
  for (int64_t i = 0; i < columns; i += 16) {
    const Unit* x = rows + i * step;
    for (int64_t row = 0; row < 16; ++row) watch.see(x + row * step, lead);
    for (int64_t j = 0; j < lead; j += 16)
      transpose16(reinterpret_cast<const uint32_t*>(x + j), step, reinterpret_cast<uint32_t*>(to + j * columns + i),
                  columns);
  }
  return watch.spoilt();
}

// As `pair_up`, likewise.
inline bool pair_watched(float* rows, int64_t step, int64_t n, int64_t d, float*, const float** along) {
  Watch<float> watch;
  for (int64_t i = 0; i < n; ++i) watch.see(rows + i * step, padded(d));
  *along = rows;
  return watch.spoilt();
}
#if defined(OPENMSA_PAIRS)
inline bool pair_watched(Pair* rows, int64_t step, int64_t n, int64_t d, Pair* to, const Pair** along) {
  *along = to;
  if (n % 2) std::memset(static_cast<void*>(rows + n * step), 0, size_t(step) * 4);
  Watch<Pair> watch;
  const uint16_t* x = reinterpret_cast<const uint16_t*>(rows);
  for (int64_t i = 0; i < n; i += 2) {
    watch.see(rows + i * step, lead<Pair>(d)), watch.see(rows + (i + 1) * step, lead<Pair>(d));
    for (int64_t c = 0; c < padded(d); c += 16, to += 16)
      interleave16(x + i * step * 2 + c, x + (i + 1) * step * 2 + c, to);
  }
  return watch.spoilt();
}
#endif

// Rows where nobody else needs them.
template <class Unit>
inline Unit* set_aside(const Unit* rows, int64_t step, int64_t n, int64_t lead, Unit* room) {
  if (rows != room)
    for (int64_t i = 0; i < n; ++i) std::memcpy(room + i * lead, rows + i * step, size_t(lead) * 4);
  return room;
}

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
