// What the index loss does to rows: packing with an eye for what is not finite, gathering, sums of
// exponentials, and the ends of its products.
#pragma once
#include "exponential.h"
#include "loss_plan.h"
#include "product.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

template <class Unit>
struct Keys {
  Unit *rows, *across;
  int64_t d, step;
  Keys(char*& memory, int64_t width, int64_t channels)
      : rows(take<Unit>(memory, width * lead<Unit>(channels))),
        across(take<Unit>(memory, width * lead<Unit>(channels))),
        d(channels),
        step(lead<Unit>(channels)) {}
  // A key that is not finite becomes 0 here and NaN in `poison`, for those alone that see it.
  bool pack(const View& x, const Piece& piece, const Tile& at, int64_t head, float* poison) {
    bool spoilt = false;
    pack_rows(x, piece.x.batch, piece.x.k0 + at.key, head, at.keys, rows);
    for (int64_t i = 0; i < at.keys; ++i) {
      if (!spoilt_row(rows + i * step, step)) continue;
      std::memset(static_cast<void*>(rows + i * step), 0, size_t(step) * 4);
      poison[i] = __builtin_nanf("");
      spoilt = true;
    }
    turn(rows, at.keys, step, units<Unit>(d), across);
    return spoilt;
  }
  Operands<Unit> against(const Unit* queries, int64_t n, const Tile& at, int64_t columns) const {
    return {queries, step, n, across, padded(at.keys), columns, units<Unit>(d)};
  }
};

// The packed queries, `units` each, of tokens in ascending order: where they lie if they are neighbours, otherwise
// copied to `room`.
template <class Unit>
const Unit* side_by_side(const Unit* queries, int64_t units, const int32_t* tokens, int64_t n, int64_t from, Unit* room) {
  if (tokens[n - 1] - tokens[0] == n - 1) return queries + (tokens[0] - from) * units;
  for (int64_t i = 0; i < n; ++i) {
    const float* own = reinterpret_cast<const float*>(queries + (tokens[i] - from) * units);
    float* to = reinterpret_cast<float*>(room + i * units);
    for (int64_t j = 0; j < units; j += W) store(to + j, load(own + j));
  }
  return room;
}

// Adds the exponentials of a product's rows to a sum per token, r rows after another. As exact as `Unit`, that
// of the student, asks for.
template <class Unit>
struct AddPowers {
  float* sums;
  const int32_t* place;  // of each row's token
  const float* shift;
  float factor;
  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&x)[R][N], int64_t row, int64_t column) const {
    for (int i = 0; i < R; ++i) {
      float* to = sums + place[row + i] + column;
      const V off = all(shift[row + i]);
      for (int j = 0; j < N; ++j)
        store(to + j * W, add(load(to + j * W), exp_of<Unit>(sub(mul(x[i][j], all(factor)), off))));
    }
  }
};

// Scaled once, so that every later reader of a score sees the same rounding.
struct StoreScaled {
  float* c;
  int64_t step;
  float factor;
  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&x)[R][N], int64_t row, int64_t column) const {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < N; ++j) store(c + (row + i) * step + column + j * W, mul(x[i][j], all(factor)));
  }
};

// Adds a product to sums that it does not start from: short runs round less than one long one.
struct AddTo {
  float* c;
  int64_t step;
  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&x)[R][N], int64_t row, int64_t column) const {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < N; ++j) {
        float* to = c + (row + i) * step + column + j * W;
        store(to, add(load(to), x[i][j]));
      }
  }
};
// The same where the rows of the sums are those of tokens.
struct AddToTokens {
  float* c;
  int64_t step, from;
  const int32_t* tokens;
  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&x)[R][N], int64_t row, int64_t column) const {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < N; ++j) {
        float* to = c + (tokens[row + i] - from) * step + column + j * W;
        store(to, add(load(to), x[i][j]));
      }
  }
};

// A sum of exponentials as far as it has come, lane by lane: total * e^top.
struct Sum {
  float top[W], total[W];
  void clear() {
    store(top, all(-3e38f));  // finite: less itself is 0
    store(total, zero());
  }
  void include(const float* x, int64_t n) {
    const V before = load(top);
    V now = before, sum = zero();
    for (int64_t i = 0; i < n; i += W) now = max(first(load(x + i), n - i, all(-INF)), now);
    for (int64_t i = 0; i < n; i += W)
      sum = add(sum, exp_exact(sub(first(load(x + i), n - i, all(-INF)), now)));
    store(total, fma(load(total), exp_exact(sub(before, now)), sum));
    store(top, now);
  }
  float logarithm() const {
    const float most = max_of(load(top));
    return most + __builtin_logf(sum_of(mul(load(total), exp_exact(sub(load(top), all(most))))));
  }
};

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
