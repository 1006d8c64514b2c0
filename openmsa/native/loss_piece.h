// One piece of the index loss: KL of its queries, their dq, and dY for those who collect dk. The letters are
// index_loss.cpp's.
#pragma once
#include "loss_rows.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

template <class Main, class Side>
struct Worker {
  const Plan& p;
  const IndexLossArguments& x;
  Keys<Main> keys;
  Keys<Side> keys_index;
  Main *q, *some_q;  // of the piece, of a batch
  Side *q_index, *some_q_index, *along;
  float *scores, *t, *y, *dy, *poison, *shift, *lse, *lse_index, *dq;
  int32_t* place;
  Sum *sums, *sums_index;
  char* end;

  Worker(const Plan& plan, char* memory)
      : p(plan), x(plan.x), keys(memory, p.width, p.d), keys_index(memory, p.width, p.di) {
    const int64_t rows = p.batch * p.r;
    q = take<Main>(memory, p.chunk * p.r * keys.step);
    some_q = take<Main>(memory, rows * keys.step);
    q_index = take<Side>(memory, p.chunk * keys_index.step);
    some_q_index = take<Side>(memory, p.batch * keys_index.step);
    along = take<Side>(memory, units<Side>(p.width) * padded(p.di));
    scores = take<float>(memory, x.lse ? 0 : rows * p.width);
    t = take<float>(memory, p.batch * p.width);
    y = take<float>(memory, p.batch * p.width);
    dy = take<float>(memory, p.width);
    poison = take<float>(memory, p.width);
    shift = take<float>(memory, rows);
    place = take<int32_t>(memory, rows);
    lse = take<float>(memory, p.chunk * p.r);
    lse_index = take<float>(memory, p.chunk);
    sums = take<Sum>(memory, x.lse ? 0 : p.chunk * p.r);
    sums_index = take<Sum>(memory, p.chunk);
    dq = take<float>(memory, p.wanted ? p.chunk * padded(p.di) : 0);
    end = memory;
  }

  void run(Piece& piece) {
    find_who_reads(piece);
    pack_queries(piece);
    for (int64_t row = 0; row < p.batch * p.r; ++row) place[row] = int32_t(row / p.r * p.width);
    normalise(piece);
    piece.loss = 0;
    const int64_t step = padded(p.di);
    if (p.wanted) std::memset(dq, 0, size_t((piece.to - piece.from) * step) * 4);
    over_tiles(piece, [&](const Tile& at, Side* row) { compare(piece, at, row); });
    if (!p.wanted) return;
    for (int64_t i = piece.from; i < piece.to; ++i)
      std::memcpy(x.dq + ((piece.x.batch * p.t + piece.x.q0 + i) * p.g + piece.group) * p.di,
                  dq + (i - piece.from) * step, size_t(p.di) * 4);
  }

  void find_who_reads(const Piece& piece) {
    if (x.blocks.data)
      find_readers(x.blocks, piece.group, piece.x, piece.from, piece.to, p.block, piece.blocks, piece.readers);
    else
      read_all(piece, p.block);
  }

  template <class Visit>
  void over_tiles(const Piece& piece, Visit visit) {
    for (int64_t j = 0; j < piece.blocks; ++j)
      for (int64_t part = 0; part < p.parts; ++part) {
        const Tile at = p.find(piece, j, part);
        Side* rows = static_cast<Side*>(piece.dy) + part * lead<Side>(p.width);
        if (at.begin < at.end) visit(at, rows);
      }
  }
  template <class Visit>
  void over_batches(const Piece& piece, const Tile& at, Visit visit) {
    for (int64_t i = at.begin; i < at.end; i += p.batch) {
      const int64_t n = smaller(p.batch, at.end - i);
      const int32_t* tokens = piece.readers.tokens + i;
      visit(i, n, tokens, padded(visible(piece, at, tokens[n - 1])));
    }
  }
  int64_t visible(const Piece& piece, const Tile& at, int64_t token) const { return p.visible(piece, at, token); }

  void pack_queries(const Piece& piece) {
    const int64_t b = piece.x.batch, first = piece.x.q0 + piece.from, n = piece.to - piece.from;
    pack_rows(x.q_index, b, first, piece.group, n, q_index);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t head = 0; head < p.r; ++head)
        pack_row(at(x.q, b, first + i, piece.group * p.r + head), x.q.kind, x.q.stride[3], p.d,
                 q + (i * p.r + head) * keys.step);
  }
  void poison_rows(float* rows, int64_t n, int64_t columns) const {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < columns; ++j) rows[i * p.width + j] += poison[j];
  }
  void score_index(const Piece& piece, const Tile& tile, const int32_t* tokens, int64_t n, int64_t columns) {
    const Side* own = side_by_side(q_index, keys_index.step, tokens, n, piece.from, some_q_index);
    product(keys_index.against(own, n, tile, columns), FromZero{}, StoreScaled{y, p.width, x.index_scale});
  }

  // The logarithms of the sums of exponentials: lse_index, and lse where none came with the call.
  void normalise(const Piece& piece) {
    const int64_t n = piece.to - piece.from;
    for (int64_t i = 0; i < n; ++i) sums_index[i].clear();
    for (int64_t i = 0; i < (x.lse ? 0 : n * p.r); ++i) sums[i].clear();
    over_tiles(piece, [&](const Tile& tile, Side*) { add_up(piece, tile); });
    for (int64_t i = 0; i < n; ++i) {
      lse_index[i] = sums_index[i].logarithm();
      const int64_t row = ((piece.x.batch * p.t + piece.x.q0 + piece.from + i) * p.g + piece.group) * p.r;
      for (int64_t head = 0; head < p.r; ++head)
        lse[i * p.r + head] = EXP_UNIT<Side> * (x.lse ? x.lse[row + head] : sums[i * p.r + head].logarithm());
    }
  }
  void add_up(const Piece& piece, const Tile& tile) {
    std::memset(poison, 0, size_t(p.width) * 4);
    bool spoilt = keys_index.pack(x.k_index, piece, tile, 0, poison);
    if (!x.lse) spoilt |= keys.pack(x.k, piece, tile, piece.group, poison);
    over_batches(piece, tile, [&](int64_t, int64_t n, const int32_t* tokens, int64_t columns) {
      score_index(piece, tile, tokens, n, columns);
      if (spoilt) poison_rows(y, n, columns);
      for (int64_t i = 0; i < n; ++i)
        sums_index[tokens[i] - piece.from].include(y + i * p.width, visible(piece, tile, tokens[i]));
      if (x.lse) return;
      const Main* own = side_by_side(q, p.r * keys.step, tokens, n, piece.from, some_q);
      product(keys.against(own, n * p.r, tile, columns), FromZero{}, StoreScaled{scores, p.width, x.scale});
      if (spoilt) poison_rows(scores, n * p.r, columns);
      for (int64_t row = 0; row < n * p.r; ++row) {
        const int64_t token = tokens[row / p.r];
        sums[(token - piece.from) * p.r + row % p.r].include(scores + row * p.width, visible(piece, tile, token));
      }
    });
  }

  // Both distributions on one tile: the loss, dY and its part of dq.
  void compare(Piece& piece, const Tile& tile, Side* rows) {
    std::memset(poison, 0, size_t(p.width) * 4);
    bool spoilt = keys_index.pack(x.k_index, piece, tile, 0, poison);
    spoilt |= keys.pack(x.k, piece, tile, piece.group, poison);
    const Side* turned = p.wanted ? pair_up(keys_index.rows, tile.keys, p.di, along) : nullptr;
    over_batches(piece, tile, [&](int64_t from, int64_t n, const int32_t* tokens, int64_t columns) {
      score_index(piece, tile, tokens, n, columns);
      if (spoilt) poison_rows(y, n, columns);
      const Main* own = side_by_side(q, p.r * keys.step, tokens, n, piece.from, some_q);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t head = 0; head < p.r; ++head) shift[i * p.r + head] = lse[(tokens[i] - piece.from) * p.r + head];
      std::memset(t, 0, size_t(n * p.width) * 4);
      const AddPowers<Side> powers{t, place, shift, x.scale * EXP_UNIT<Side>};
      product(keys.against(own, n * p.r, tile, columns), FromZero{}, powers);
      Side* made = rows + from * p.dy_step;
      V kl = zero();
      for (int64_t i = 0; i < n; ++i) {
        kl = add(kl, diverge(piece, i, tokens[i], visible(piece, tile, tokens[i])));
        if (p.wanted) round_row(dy, p.width, made + i * p.dy_step);
      }
      piece.loss += double(sum_of(kl));
      if (!p.wanted) return;
      const int64_t step = padded(p.di), contracted = units<Side>(smaller(columns, tile.keys));
      product(Operands<Side>{made, p.dy_step, n, turned, step, step, contracted},
              FromZero{}, AddToTokens{dq, step, piece.from, tokens});
    });
  }

  // w KL of row i of t and y; its dY.
  V diverge(const Piece& piece, int64_t i, int64_t token, int64_t n) {
    const float weight = x.weights ? x.weights[piece.x.batch * p.t + piece.x.q0 + token] : 1.0f;
    const V share = all(1.0f / float(p.r)), slope = all(weight * x.index_scale);
    const V off = all(lse_index[token - piece.from]), tiny = all(1.17549435e-38f);
    const float *ti = t + i * p.width, *yi = y + i * p.width;
    V kl = zero();
    int64_t j = 0;
    for (; j < n; j += W) {
      const V teacher = mul(load(ti + j), share), log_student = sub(load(yi + j), off);
      const V excess = sub(exp_exact(log_student), teacher);
      const V gap = sub(log_exact(max(tiny, teacher)), log_student);
      kl = add(kl, first(fma(teacher, gap, excess), n - j, zero()));
      store(dy + j, first(mul(excess, slope), n - j, zero()));
    }
    for (; j < p.width; j += W) store(dy + j, zero());
    return mul(kl, all(weight));
  }
};

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
