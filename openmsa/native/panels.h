// Panels: tensors copied into what the micro-kernel reads.
//
//   rows        [rows][lead]              one row of a tensor after the other, its channels in units
//   across      [units of channels][n]    the rows turned into columns: contraction over channels
//   along       [units of rows][lead]     contraction over rows, channels as columns
//
// Leads and columns are multiples of PAD; what lies beyond the tensor is 0.
#pragma once
#include "simd.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

OPENMSA_INLINE char* at(const View& x, int64_t b, int64_t token, int64_t head) {
  return static_cast<char*>(x.data) +
         (b * x.stride[0] + token * x.stride[1] + head * x.stride[2]) * bytes_of(x.kind);
}

// Units from one row of a rows panel to the next.
template <class Unit>
OPENMSA_INLINE int64_t lead(int64_t channels) {
  return padded(units<Unit>(channels));
}

// One row of d channels, `stride` elements apart, as floats; zeros up to `end`.
inline void widen(const void* from, Kind kind, int64_t stride, int64_t d, float* to, int64_t end) {
  int64_t i = 0;
  if (stride == 1 && kind == Kind::f32 && d > 0) {
    for (; i + W <= d; i += W) store(to + i, load(static_cast<const float*>(from) + i));
  } else if (stride == 1) {
    const uint16_t* x = static_cast<const uint16_t*>(from);
    for (; i + W <= d; i += W) store(to + i, kind == Kind::bf16 ? load_bf16(x + i) : load_f16(x + i));
  }
  for (; i < d; ++i) to[i] = read(from, kind, i * stride);
  for (; i < end; ++i) to[i] = 0.0f;
}
// d floats -> a row of a tensor.
inline void narrow(const float* from, void* to, Kind kind, int64_t stride, int64_t d) {
  int64_t i = 0;
  if (stride == 1 && kind == Kind::f32 && d > 0) {
    std::memcpy(to, from, size_t(d) * 4);
    i = d;
  } else if (stride == 1) {
    uint16_t* x = static_cast<uint16_t*>(to);
    for (; i + W <= d; i += W)
      kind == Kind::bf16 ? store_bf16(x + i, load(from + i)) : store_f16(x + i, load(from + i));
  }
  for (; i < d; ++i) write(to, kind, i * stride, from[i]);
}

// One row of a rows panel.
inline void pack_row(const void* from, Kind kind, int64_t stride, int64_t d, float* to) {
  widen(from, kind, stride, d, to, lead<float>(d));
}
inline void pack_row(const void* from, Kind kind, int64_t stride, int64_t d, Pair* to) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(to);
  int64_t end = lead<Pair>(d) * 2;
  if (kind == Kind::bf16 && stride == 1) {  // short rows: a call of memcpy would take longer than the copy
    const uint16_t* x = static_cast<const uint16_t*>(from);
    int64_t i = 0;
    for (; i + 2 * W <= d; i += 2 * W)
      store(reinterpret_cast<float*>(halves + i), load(reinterpret_cast<const float*>(x + i)));
    for (; i < d; ++i) halves[i] = x[i];
  } else if (kind == Kind::bf16) {
    for (int64_t i = 0; i < d; ++i) halves[i] = static_cast<const uint16_t*>(from)[i * stride];
  } else {
    for (int64_t i = 0; i < d; ++i) halves[i] = to_bf16(read(from, kind, i * stride));
  }
  for (int64_t i = d; i < end; ++i) halves[i] = 0;
}
// Rows token .. token + n - 1 of one head.
template <class Unit>
inline void pack_rows(const View& x, int64_t b, int64_t token, int64_t head, int64_t n, Unit* to) {
  const int64_t d = x.size[3], step = lead<Unit>(d), bytes = x.stride[1] * bytes_of(x.kind);
  const char* from = at(x, b, token, head);
  for (int64_t i = 0; i < n; ++i) pack_row(from + i * bytes, x.kind, x.stride[3], d, to + i * step);
}
// Rows token + list[0], token + list[1] ..., those a little further on asked for.
template <class Unit>
inline void pack_list(const View& x, int64_t b, int64_t token, const int32_t* list, int64_t head, int64_t n, Unit* to) {
  const int64_t d = x.size[3], step = lead<Unit>(d), bytes = d * bytes_of(x.kind);
  for (int64_t i = 0; i < n; ++i) {
    if (i + 4 < n) {
      const char* later = at(x, b, token + list[i + 4], head);
      for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(later + j, 0, 2);
    }
    pack_row(at(x, b, token + list[i], head), x.kind, x.stride[3], d, to + i * step);
  }
}
// d floats (d a multiple of PAD) as a row of units: what a product makes becomes what the next one reads.
inline void round_row(const float* from, int64_t d, float* to) {
  if (from != to) std::memcpy(to, from, size_t(d) * 4);
}
inline void round_row(const float* from, int64_t d, Pair* to) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < d; i += W) store_bf16(halves + i, load(from + i));
}

// A row of units with something in it that is not finite.
inline bool spoilt_row(const float* x, int64_t lead) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < lead; ++i) bad |= (bits_of(x[i]) & 0x7f800000u) == 0x7f800000u;
  return bad != 0;
}
inline bool spoilt_row(const Pair* x, int64_t lead) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < lead; ++i)
    bad |= ((x[i] & 0x7f80u) == 0x7f80u) | ((x[i] & 0x7f800000u) == 0x7f800000u);
  return bad != 0;
}

// rows [n][lead] -> across [units][columns], columns = padded(n). Rows beyond n must be there and are
// set to 0: give `rows` room for padded(n) of them.
template <class Unit>
inline void turn(Unit* rows, int64_t n, int64_t lead, int64_t unit_count, Unit* to) {
  const int64_t columns = padded(n);
  std::memset(static_cast<void*>(rows + n * lead), 0, size_t((columns - n) * lead) * 4);
  const uint32_t* x = reinterpret_cast<const uint32_t*>(rows);
  uint32_t* y = reinterpret_cast<uint32_t*>(to);
  for (int64_t j = 0; j < padded(unit_count); j += 16)
    for (int64_t i = 0; i < columns; i += 16)
      transpose16(x + i * lead + j, lead, y + j * columns + i, columns);
}
// rows [n][lead of d channels] -> along [units of n][padded(d)]. Rows beyond n as in `turn`. A panel of
// floats is its own: the answer is where the panel lies.
inline const float* pair_up(float* rows, int64_t, int64_t, float*) { return rows; }
#if defined(OPENMSA_PAIRS)
inline const Pair* pair_up(Pair* rows, int64_t n, int64_t d, Pair* to) {
  const int64_t step = lead<Pair>(d) * 2, columns = padded(d);
  uint16_t* x = reinterpret_cast<uint16_t*>(rows);
  if (n % 2) std::memset(static_cast<void*>(x + n * step), 0, size_t(step) * 2);
  for (int64_t i = 0; i < n; i += 2)
    for (int64_t c = 0; c < columns; c += 16)
      interleave16(x + i * step + c, x + (i + 1) * step + c, to + i / 2 * columns + c);
  return to;
}
#endif

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
