// KL(attention || index) of every query token and group, and its gradients.
//
//   T   = mean over the group's r heads of exp(q.k * scale - lse)     teacher
//   P   = exp(q_index.k_index * index_scale - lse_index)              student
//   KL  = sum of T (log T - log P) + (P - T)    the bracket adds up to 0 but for rounding: it takes away
//                                               to first order what an inexact lse does to the rest
//   dY  = w index_scale (P - T);    dq = dY k_index,    dk = dY q_index
//
// A piece is a chunk of query tokens of one group. It visits tiles of keys one after the other, each with the
// tokens that read it: once for the sums of exponentials, once for the rest. Tasks over pieces own dq and
// leave dY behind; tasks over tiles of keys own dk and collect it. A stretch, as many pieces as fit the
// workspace, is through both before the next begins.
#include "exponential.h"
#include "product.h"
#include "work.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

constexpr int64_t TILE = 128, STRETCH_BYTES = 64 << 20, PIECE_BYTES = 1 << 20;  // of dY, and of packed queries

struct Piece {
  Sequence x;
  int64_t group, from, to, blocks;
  Readers readers;
  void* dy;  // [readers of all blocks][parts][lead of a tile's keys]
  double loss;
};

// Keys key .. key + keys - 1 of a piece's sequence and their readers tokens[begin .. end).
struct Tile {
  int64_t key, keys, begin, end;
};

struct Plan {
  const IndexLossArguments& x;
  bool wanted;
  int64_t t, s, g, r, d, di;
  int64_t block, parts, tile, width;  // a block is `parts` tiles of `tile` keys, padded to `width`
  int64_t blocks, reads;              // blocks of the longest sequence; most that one token reads
  int64_t chunk, batch, dy_step;      // tokens of a piece, tokens multiplied at once, units of a row of dY
  int64_t pieces, slot_bytes, slots;

  template <class Main, class Side>
  static Plan of(const IndexLossArguments& x);
  int64_t chunks(const Sequence& q) const { return (q.t + chunk - 1) / chunk; }
  Tile find(const Piece& piece, int64_t number, int64_t part) const;
  int64_t visible(const Piece& piece, const Tile& at, int64_t token) const {
    return smaller(at.keys, piece.x.position(token) - at.key + 1);
  }
};

template <class Main, class Side>
Plan Plan::of(const IndexLossArguments& x) {
  const int64_t t = x.q.size[1], s = x.k.size[1], h = x.q.size[2], g = x.k.size[2];
  Plan p{x, x.dq || x.dk, t, s, g, h / g, x.q.size[3], x.q_index.size[3], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  const int64_t queries = longest(x.borders, x.borders.q, t), keys = longest(x.borders, x.borders.k, s);
  p.block = x.blocks.data ? x.block_size : TILE;
  const int64_t most = larger(smaller(p.block, keys), 1);
  p.parts = (most + TILE - 1) / TILE;
  p.tile = (most + p.parts - 1) / p.parts;
  p.width = padded(p.tile);
  p.blocks = (keys + p.block - 1) / p.block;
  p.reads = x.blocks.data ? smaller(x.blocks.size[3], p.blocks) : p.blocks;
  p.dy_step = p.parts * lead<Side>(p.width);
  // Long chunks share packed keys among more readers; short ones keep pieces small and many.
  const int64_t read_bytes = p.wanted ? 4 + p.dy_step * 4 : 4, token_bytes = larger(p.reads * read_bytes, 1);
  const int64_t fair = larger(64, smaller(256, x.q.size[0] * t * g / 64));
  const int64_t query_bytes = p.r * lead<Main>(p.d) * 4;
  p.chunk = larger(smaller(fair, PIECE_BYTES / larger(token_bytes, query_bytes)), 8);
  p.chunk = larger(smaller(smaller(p.chunk, STRETCH_BYTES / token_bytes), queries), 1);
  p.batch = smaller(larger(smaller(192 / p.r, 64), 1), p.chunk);
  p.pieces = g * count_tasks(x.borders, x.q.size[0], t, s, [&](const Sequence& q) { return p.chunks(q); });
  p.slot_bytes = p.blocks * 16 + p.chunk * token_bytes + 256;
  p.slots = larger(smaller(STRETCH_BYTES / p.slot_bytes, smaller(p.pieces, 4096)), 1);
  return p;
}

Tile Plan::find(const Piece& piece, int64_t number, int64_t part) const {
  Tile at{number * block + part * tile, 0, 0, 0};
  at.keys = smaller(smaller(tile, block - part * tile), piece.x.s - at.key);
  if (number >= piece.blocks || at.keys <= 0) return at;
  at.begin = piece.readers.first[number];
  at.end = piece.readers.first[number + 1];
  while (at.begin < at.end && visible(piece, at, piece.readers.tokens[at.begin]) <= 0) ++at.begin;
  return at;
}

// Without a selection every token reads every block that it sees.
void read_all(const Piece& piece, int64_t block) {
  const Readers& out = piece.readers;
  out.first[0] = 0;
  for (int64_t j = 0, n = 0; j < piece.blocks; out.first[++j] = n)
    for (int64_t i = larger(piece.from, j * block - piece.x.position(0)); i < piece.to; ++i)
      out.tokens[n++] = int32_t(i);
}

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
      const int64_t token = piece.x.batch * p.t + piece.x.q0 + piece.from + i;
      const float* given = x.lse + (token * p.g + piece.group) * p.r;
      for (int64_t head = 0; head < p.r; ++head)
        lse[i * p.r + head] = EXP_UNIT<Side> * (x.lse ? given[head] : sums[i * p.r + head].logarithm());
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

// Collects dk of one tile of keys from the pieces of a stretch.
template <class Side>
struct Collector {
  static constexpr int64_t BATCH = 128;
  const Plan& p;
  int64_t count = 0, q_step, columns;
  Side *dy, *q, *dy_pairs, *q_pairs, *across;
  float* sums;
  char* end;

  Collector(const Plan& plan, char* memory) : p(plan), q_step(lead<Side>(p.di)), columns(padded(p.di)) {
    dy = take<Side>(memory, BATCH * lead<Side>(p.width));
    q = take<Side>(memory, BATCH * q_step);
    dy_pairs = take<Side>(memory, BATCH * p.width);
    q_pairs = take<Side>(memory, BATCH * columns);
    across = take<Side>(memory, BATCH * p.width);
    sums = take<float>(memory, p.width * columns);
    end = memory;
  }

  void run(const Piece* piece, int64_t pieces, int64_t block, int64_t part) {
    const Sequence& sequence = piece->x;
    const int64_t step = lead<Side>(p.width), key = block * p.block + part * p.tile;
    const int64_t keys = smaller(smaller(p.tile, p.block - part * p.tile), sequence.s - key);
    for (int64_t i = 0; i < p.width * columns; ++i) sums[i] = 0.0f;
    const View& view = p.x.q_index;
    for (const Piece* last = piece + pieces; piece < last; ++piece) {
      const Tile tile = p.find(*piece, block, part);
      for (int64_t i = tile.begin; i < tile.end; ++i) {
        const Side* row = static_cast<const Side*>(piece->dy) + i * p.dy_step + part * step;
        std::memcpy(static_cast<void*>(dy + count * step), row, size_t(step) * 4);
        Side* own = q + count * q_step;
        pack_row(at(view, sequence.batch, sequence.q0 + piece->readers.tokens[i], piece->group), view.kind,
                 view.stride[3], p.di, own);
        // Its dY is NaN where it reads; where it does not, 0 times it must be 0.
        if (spoilt_row(own, q_step)) std::memset(static_cast<void*>(own), 0, size_t(q_step) * 4);
        if (++count == BATCH) multiply(keys);
      }
    }
    if (count) multiply(keys);
    for (int64_t i = 0; i < keys; ++i) {
      float* to = p.x.dk + (sequence.batch * p.s + sequence.k0 + key + i) * p.di;
      for (int64_t c = 0; c < p.di; ++c) to[c] += sums[i * columns + c];
    }
  }

  void multiply(int64_t keys) {
    const int64_t n = units<Side>(count);
    const Side* left = pair_up(dy, count, p.width, dy_pairs);
    const Side* right = pair_up(q, count, p.di, q_pairs);
    turn(const_cast<Side*>(left), n, p.width, p.width, across);
    product(Operands<Side>{across, padded(n), keys, right, columns, columns, n}, FromZero{},
            AddTo{sums, columns});
    count = 0;
  }
};

template <class Main, class Side>
struct Stretch {
  const Plan& p;
  const Scratch& scratch;
  Piece* pieces;
  int64_t count;

  static void visit(void* context, int64_t task, int worker) {
    const Stretch& own = *static_cast<Stretch*>(context);
    // Later chunks see more keys: they go first.
    Worker<Main, Side>(own.p, own.scratch.of(worker)).run(own.pieces[own.count - 1 - task]);
  }
  // Pieces first .. last - 1 of one sequence.
  int64_t same(int64_t first) const {
    int64_t last = first + 1;
    const Sequence& x = pieces[first].x;
    while (last < count && pieces[last].x.batch == x.batch && pieces[last].x.q0 == x.q0) ++last;
    return last;
  }
  int64_t tiles(int64_t first) const { return (pieces[first].x.s + p.block - 1) / p.block * p.parts; }
  static void collect(void* context, int64_t task, int worker) {
    const Stretch& own = *static_cast<Stretch*>(context);
    int64_t first = 0;
    for (; task >= own.tiles(first); first = own.same(first)) task -= own.tiles(first);
    Collector<Side>(own.p, own.scratch.of(worker))
        .run(own.pieces + first, own.same(first) - first, task / own.p.parts, task % own.p.parts);
  }
  void run() {
    run_tasks(p.x.threads, count, visit, this);
    for (int64_t i = 0; i < count; ++i) *p.x.loss += pieces[i].loss;
    if (!p.wanted) return;
    int64_t tasks = 0;
    for (int64_t first = 0; first < count; first = same(first)) tasks += tiles(first);
    run_tasks(p.x.threads, tasks, collect, this);
  }
};

void start(const IndexLossArguments& x) {
  const int64_t rows = x.q.size[0] * x.q.size[1];
  double total = double(rows);
  if (x.weights) {
    total = 0;
    for (int64_t i = 0; i < rows; ++i) total += double(x.weights[i]);
  }
  *x.loss = 0;
  *x.weight = total * double(x.k.size[2]);
  if (x.dq) std::memset(x.dq, 0, size_t(rows * x.q_index.size[2] * x.q_index.size[3]) * 4);
  if (x.dk) std::memset(x.dk, 0, size_t(x.k_index.size[0] * x.k_index.size[1] * x.k_index.size[3]) * 4);
}

template <class Main, class Side>
bool run(const IndexLossArguments& x) {
  const Plan p = Plan::of<Main, Side>(x);
  start(x);
  if (p.pieces == 0) return true;
  char* const nowhere = reinterpret_cast<char*>(64);
  const int64_t bytes = larger(Worker<Main, Side>(p, nowhere).end - nowhere, Collector<Side>(p, nowhere).end - nowhere);
  const Scratch scratch(int(larger(x.threads, 1)), bytes), slots(int(p.slots), p.slot_bytes);
  const Scratch list(1, p.slots * int64_t(sizeof(Piece)));
  if (!scratch.memory || !slots.memory || !list.memory) return false;
  Stretch<Main, Side> stretch{p, scratch, reinterpret_cast<Piece*>(list.memory), 0};
  const int64_t count = sequences(x.borders, x.q.size[0]);
  for (int64_t i = 0; i < count; ++i) {
    const Sequence own = sequence(x.borders, i, p.t, p.s);
    for (int64_t task = 0; task < p.chunks(own) * p.g; ++task) {
      const int64_t from = task / p.g * p.chunk, to = smaller(from + p.chunk, own.t);
      char* memory = slots.of(int(stretch.count));
      const int64_t blocks = own.position(to - 1) / p.block + 1;
      int64_t* first = take<int64_t>(memory, p.blocks + 1);
      int64_t* seen = take<int64_t>(memory, p.blocks);
      int32_t* tokens = take<int32_t>(memory, p.chunk * p.reads);
      stretch.pieces[stretch.count++] = {own, task % p.g, from, to, blocks, {first, tokens, seen}, memory, 0};
      if (stretch.count < p.slots) continue;
      stretch.run();
      stretch.count = 0;
    }
  }
  if (stretch.count) stretch.run();
  return true;
}

}  // namespace

bool index_loss(const IndexLossArguments& x) {
#if defined(OPENMSA_PAIRS)
  const bool pairs = x.q.kind == Kind::bf16 && x.k.kind == Kind::bf16;
  if (pairs && x.q_index.kind == Kind::bf16 && x.k_index.kind == Kind::bf16) return run<Pair, Pair>(x);
  if (pairs) return run<Pair, float>(x);
#endif
  return run<float, float>(x);
}

}  // namespace OPENMSA_ISA
}  // namespace openmsa
