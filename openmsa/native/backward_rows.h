// The steps of the backward pass of attention: a panel of query rows, and what follows each product.
//
// Keys are rows of every product and queries columns, so that lse and delta are vectors.
#pragma once
#include "backward_plan.h"
#include "exponential.h"
#include "product.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

constexpr int64_t CHAIN = 32;        // floats added one to the next before they join the others
constexpr int64_t WIDE_CHAIN = 128;  // along the channels of a score

// A panel of query rows, and what goes with each.
template <class Unit>
struct Rows {
  Unit *q, *dout;              // [panel][lead]
  float *low, *delta, *share;  // low: -lse, in the units of exp_of
  float* limit;                // how many of the tile's keys it sees
  int64_t* place;              // its number in the chunk
  int64_t n, most;             // rows; the largest limit

  Rows(const Call& call, char*& memory)
      : q(take<Unit>(memory, call.panel * lead<Unit>(call.d))),
        dout(take<Unit>(memory, call.panel * lead<Unit>(call.dv))),
        low(take<float>(memory, call.panel)),
        delta(take<float>(memory, call.panel)),
        share(take<float>(memory, call.panel)),
        limit(take<float>(memory, call.panel)),
        place(take<int64_t>(memory, call.panel)) {}

  // Rows row .. of the tokens times the group's heads, as many as the panel holds; false: none is left.
  bool gather(const Call& call, const Sequence& x, int64_t group, const Tokens& tokens, int64_t row,
              const Tile& tile, int64_t from) {
    const int64_t heads = call.groups.heads;
    n = smaller(call.panel, tokens.count * heads - row);
    if (n <= 0) return false;
    int64_t i = row / heads, r = row % heads;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t token = tokens[i], seen = x.position(token) - tile.start + 1;
      place[j] = (token - from) * heads + r;
      limit[j] = float(most = smaller(seen, tile.width));
      one(call, x, token, group * heads + r, j);
      if (++r == heads) r = 0, ++i;
    }
    for (int64_t j = n; j < padded(n); ++j) low[j] = delta[j] = share[j] = limit[j] = 0.0f;
    return true;
  }

 private:
  // A row that is not finite anywhere is NaN for what it reads and absent for the rest; one that reads
  // nothing is absent.
  void one(const Call& call, const Sequence& x, int64_t token, int64_t head, int64_t j) {
    const auto &q_in = call.x.q, &dout_in = call.x.dout;
    const int64_t flat = call.flat(x, token);
    const float lse = call.x.lse[flat * q_in.size[2] + head];
    low[j] = -lse * EXP_UNIT<Unit>;
    delta[j] = call.delta[call.in_wave(flat, head)];
    share[j] = call.share ? call.share[call.in_wave(flat, head)] : 1.0f;
    Unit *q_to = q + j * lead<Unit>(call.d), *dout_to = dout + j * lead<Unit>(call.dv);
    if (!spoilt(lse) && !spoilt(delta[j])) {
      pack_row(at(q_in, x.batch, x.q0 + token, head), q_in.kind, q_in.stride[3], call.d, q_to);
      pack_row(at(dout_in, x.batch, x.q0 + token, head), dout_in.kind, dout_in.stride[3], call.dv, dout_to);
      return;
    }
    if (lse == -INF) limit[j] = 0.0f;
    low[j] = delta[j] = __builtin_nanf("");
    std::memset(static_cast<void*>(q_to), 0, size_t(lead<Unit>(call.d)) * 4);
    std::memset(static_cast<void*>(dout_to), 0, size_t(lead<Unit>(call.dv)) * 4);
  }
};

OPENMSA_INLINE void put(float* row, int64_t column, V x) { store(row + column, x); }
OPENMSA_INLINE void put(Pair* row, int64_t column, V x) { store_bf16(reinterpret_cast<uint16_t*>(row) + column, x); }

// What follows the scores (P from X), or `gradient` (dX from P and dP): p is [keys][step] in floats, `to` the
// same in units; for floats both are one. `earlier`: sums over the channels before these, if there are any.
template <class Unit, bool gradient>
struct Weigh {
  const Rows<Unit>& rows;
  float scale;
  float* p;
  Unit* to;
  int64_t step;
  const float* earlier;

  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&x)[R][N], int64_t row, int64_t column) const {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < N; ++j) {
        const int64_t c = column + j * W, here = (row + i) * step;
        const V sum = earlier ? add(x[i][j], load(earlier + here + c)) : x[i][j];
        V y;
        if constexpr (gradient)
          y = mul(load(p + here + c), sub(sum, load(rows.delta + c)));
        else
          y = exp_of<Unit>(fma(sum, all(scale), load(rows.low + c)));
        if constexpr (!gradient && UnitOf<Unit>::width == 1) y = mul(y, load(rows.share + c));
        y = where_le(all(float(row + i + 1)), load(rows.limit + c), y, zero());
        if constexpr (!gradient) store(p + here + c, y);
        if constexpr (gradient || UnitOf<Unit>::width > 1) put(to + here / UnitOf<Unit>::width, c, y);
      }
  }
};

// Sums in rows of `c`, those at `place` if it is given. A product is added to them when it is done: to start from
// what is there would make one long chain of sums, whose roundings add up. Its beginning asks for them.
struct Sums {
  float* c;
  int64_t step;
  const int64_t* place;
  OPENMSA_INLINE float* at(const Sums& to, int64_t row, int64_t column) {
    return to.c + (to.place ? to.place[row] : row) * to.step + column;
  }
};
struct Fetch {
  Sums to;
  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&sums)[R][N], int64_t row, int64_t column) const {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < N; ++j) {
        if (j * W % 16 == 0) __builtin_prefetch(Sums::at(to, row + i, column + j * W), 1);
        sums[i][j] = zero();
      }
  }
};
struct Add {
  Sums to;
  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&sums)[R][N], int64_t row, int64_t column) const {
    for (int i = 0; i < R; ++i) {
      float* there = Sums::at(to, row + i, column);
      for (int j = 0; j < N; ++j) store(there + j * W, add(load(there + j * W), sums[i][j]));
    }
  }
};

template <class Unit>
__attribute__((noinline)) void accumulate(const Operands<Unit>& x, const Sums& to) {
  const int64_t chain = UnitOf<Unit>::width == 1 ? CHAIN : x.n;
  for (int64_t u = 0; u < x.n; u += chain)
    product<Unit>({x.a + u, x.a_step, x.rows, x.b + u * x.b_step, x.b_step, x.columns, smaller(chain, x.n - u)},
                  Fetch{to}, Add{to});
}

// delta of `n` rows (token, head of the wave) from number `row` on.
template <class Unit>
void find_delta(const Call& call, int64_t row, int64_t n, char* memory) {
  const View *views[2] = {&call.x.dout, &call.x.out};
  const int64_t step = lead<Unit>(call.dv), heads = call.wave_heads();
  Unit* rows = take<Unit>(memory, 16 * step);
  Unit* across[2] = {take<Unit>(memory, 16 * step), take<Unit>(memory, 16 * step)};
  float* sums = take<float>(memory, 16);
  for (const int64_t end = row + n; row < end; row += 16) {
    const int64_t count = smaller(16, end - row);
    for (int side = 0; side < 2; ++side) {
      const View& x = *views[side];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t token = (row + i) / heads, head = (row + i) % heads + call.wave_head();
        pack_row(at(x, token / call.t, token % call.t, head), x.kind, x.stride[3], call.dv, rows + i * step);
      }
      turn(rows, count, step, units<Unit>(call.dv), across[side]);
    }
    for (int64_t c = 0; c < 16; c += W) {
      V sum = zero();
      for (int64_t u = 0; u < units<Unit>(call.dv); ++u)
        sum = dot(sum, lanes(across[0] + u * 16 + c), lanes(across[1] + u * 16 + c));
      store(sums + c, sum);
    }
    std::memcpy(call.delta + row, sums, size_t(count) * 4);
    for (int64_t i = row; call.share && i < row + count; ++i) call.share[i] = 1.0f;
  }
}

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
