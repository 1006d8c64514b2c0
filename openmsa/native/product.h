// The micro-kernel: C [rows][columns] from A [rows][lead] and B [units][columns], sums in registers.
//
// `start(sums, row, column)` sets the sums of a tile before it is multiplied, `done` takes them after;
// both are called with V sums[R][N] for rows row .. row + R - 1 and N * W columns. A panel of B as wide as
// a tile stays in the first cache while all rows pass by.
#pragma once
#include "panels.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

template <class Unit, int R, int N>
OPENMSA_INLINE void multiply(const Unit* a, int64_t a_step, const Unit* b, int64_t b_step, int64_t n, V (&sums)[R][N]) {
  for (int64_t u = 0; u < n; ++u) {
    decltype(lanes(b)) right[N];
    for (int j = 0; j < N; ++j) right[j] = lanes(b + u * b_step + j * W);
    for (int i = 0; i < R; ++i) {
      const auto left = spread(a + i * a_step + u);
      for (int j = 0; j < N; ++j) sums[i][j] = dot(sums[i][j], left, right[j]);
    }
  }
}

template <class Unit>
struct Operands {
  const Unit* a;
  int64_t a_step, rows;
  const Unit* b;
  int64_t b_step, columns;  // columns: a multiple of PAD
  int64_t n;                // units to contract
};

template <int R, int N, class Unit, class Start, class Done>
OPENMSA_INLINE void some_rows(const Operands<Unit>& x, int64_t& row, int64_t column, Start& start, Done& done) {
  for (; row + R <= x.rows; row += R) {
    V sums[R][N];
    start(sums, row, column);
    multiply<Unit, R, N>(x.a + row * x.a_step, x.a_step, x.b + column, x.b_step, x.n, sums);
    done(sums, row, column);
  }
}

template <int R, int N, class Unit, class Start, class Done>
OPENMSA_INLINE void all_rows(const Operands<Unit>& x, int64_t column, Start& start, Done& done) {
  int64_t row = 0;
  some_rows<R, N>(x, row, column, start, done);
  if constexpr (R > 4) some_rows<4, N>(x, row, column, start, done);
  if constexpr (R > 2) some_rows<2, N>(x, row, column, start, done);
  some_rows<1, N>(x, row, column, start, done);
}

template <class Unit, class Start, class Done>
inline void product(const Operands<Unit>& x, Start start, Done done) {
  int64_t column = 0;
  for (; column + WIDE * W <= x.columns; column += WIDE * W)
    all_rows<WIDE_ROWS, WIDE>(x, column, start, done);
  if constexpr (WIDE * W > PAD) {
    for (; column + 2 * W <= x.columns; column += 2 * W) all_rows<NARROW_ROWS, 2>(x, column, start, done);
    for (; column + W <= x.columns; column += W) all_rows<NARROW_ROWS, 1>(x, column, start, done);
  }
}

// The usual beginnings and ends.
struct FromZero {
  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&sums)[R][N], int64_t, int64_t) const {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < N; ++j) sums[i][j] = zero();
  }
};
struct FromThere {
  const float* c;
  int64_t step;
  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&sums)[R][N], int64_t row, int64_t column) const {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < N; ++j) sums[i][j] = load(c + (row + i) * step + column + j * W);
  }
};
struct Store {
  float* c;
  int64_t step;
  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&sums)[R][N], int64_t row, int64_t column) const {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < N; ++j) store(c + (row + i) * step + column + j * W, sums[i][j]);
  }
};

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
