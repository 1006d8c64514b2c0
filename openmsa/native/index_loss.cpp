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
#include "loss_piece.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

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
  const int64_t workers = larger(smaller(x.threads, p.slots * larger(p.blocks * p.parts, 1)), 1);
  const Scratch scratch(int(workers), bytes), slots(int(p.slots), p.slot_bytes);
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
