// Attention over the visible keys of the selected blocks, or over every visible key: forward.
//
//   X = q K * scale;  m = max X;  P = exp(X - m);  l = sum P;  out = P V / l;  lse = m + log l
//
// A task is a chunk of query tokens with the heads of one group. It goes through the keys once, block by
// block: a block is packed, the rows that read it are gathered, and their m, l and O move on,
//
//   m' = max(m, max X);  c = exp(m - m');  l' = l c + sum P;  O' = O c + P V
//
// Where blocks are shorter than a group has heads, tokens have little to share: each goes through its own keys,
// packed from where they lie.
//
// Few queries against many keys give too few tasks: then a task takes a part of its chunk's blocks, and the
// parts are put together in order. The parts follow from the sizes alone, so threads change no bit; the size
// of a chunk changes none either, for every row goes its own way through the same blocks.
#include "attend_plan.h"
#include "exponential.h"
#include "keys.h"
#include "product.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

constexpr int64_t PANEL = 48;  // rows between two products
constexpr int64_t RUN = 64;    // units summed in one go: the error of a sum grows with its length

OPENMSA_INLINE void put(float* row, int64_t i, V x) { store(row + i, x); }
OPENMSA_INLINE void put(Pair* row, int64_t i, V x) { store_bf16(reinterpret_cast<uint16_t*>(row) + i, x); }

// X [columns] -> P = exp(X - m') in units, in place; moves m and l on; c is W times exp(m - m').
template <class Unit>
inline void weigh(float* x, int64_t visible, int64_t columns, float& m, float& l, float* c) {
  const int64_t whole = visible / W * W;
  V top = all(-INF);
  for (int64_t j = 0; j < whole; j += W) top = max(load(x + j), top);
  if (whole < visible) top = max(first(load(x + whole), visible - whole, all(-INF)), top);
  const float best = max_of(top), now = best > m ? best : m, safe = now == -INF ? 0.0f : now;
  store(c, exp_of<Unit>(all(m - safe)));
  m = now;

  Unit* p = reinterpret_cast<Unit*>(x);
  V sum = zero();
  int64_t j = 0;
  for (; j < whole; j += W) {
    const V weight = exp_of<Unit>(sub(load(x + j), all(safe)));
    sum = add(sum, weight);
    put(p, j, weight);
  }
  if (j < visible) {
    const V weight = first(exp_of<Unit>(sub(load(x + j), all(safe))), visible - j, zero());
    sum = add(sum, weight);
    put(p, j, weight);
    j += W;
  }
  for (; j < columns; j += W) put(p, j, zero());
  l = (l < 0 ? 0.0f : l) * c[0] + sum_of(sum);
}

// X (+)= sums * scale. Stored before anything is subtracted: fused, the largest score would not give exactly 1.
// Where a sum of products is meant, it is written as one: left to the compiler, tiles would differ in rounding.
struct Scaled {
  float* x;
  int64_t step;
  const float* scale;  // in W lanes: in memory it takes no register from the sums
  bool more;
  Ahead& next;
  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&sums)[R][N], int64_t row, int64_t column) const {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < N; ++j) {
        float* to = x + (row + i) * step + column + j * W;
        store(to, more ? fma(sums[i][j], load(scale), load(to)) : mul(sums[i][j], load(scale)));
      }
    next.ask();
  }
};
// O = O c + sums
struct MovedOn {
  float* const* o;
  const float* c;
  Ahead& next;
  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&sums)[R][N], int64_t row, int64_t column) const {
    for (int i = 0; i < R; ++i) {
      const V by = load(c + (row + i) * W);
      for (int j = 0; j < N; ++j) {
        float* to = o[row + i] + column + j * W;
        store(to, fma(load(to), by, sums[i][j]));
      }
    }
    next.ask();
  }
};

template <class Unit>
struct Attention {
  const AttendArguments& x;
  const Plan plan;
  const Scratch scratch;
  float* const states;  // of all parts, if there are any
  static constexpr float UNIT = EXP_UNIT<Unit>;

  static int64_t bytes(const Plan& plan) {
    const int64_t n = padded(plan.width), d = lead<Unit>(plan.d), dv = lead<Unit>(plan.dv);
    const int64_t packed = n * (2 * d + dv) + n * padded(plan.dv) + PANEL * (d + n + W + 4) + 11 * PAD;
    const int64_t reads = plan.apart ? plan.top_k * plan.block * 4 + 64 : Visits::bytes(plan);
    return packed * 4 + reads + (plan.parts == 1 ? State::floats(plan) * 4 : 0);
  }
  explicit Attention(const AttendArguments& x)
      : x(x), plan(x), scratch(int(smaller(x.threads, plan.tasks * plan.parts)), bytes(plan)),
        states(plan.parts == 1 ? nullptr
                               : static_cast<float*>(allocate(plan.tasks * plan.parts * State::floats(plan) * 4))) {}
  ~Attention() { release(states); }

  bool run() {
    if (!scratch.memory || (plan.parts > 1 && !states)) return false;
    run_tasks(x.threads, plan.tasks * plan.parts, [](void* self, int64_t task, int worker) {
      static_cast<Attention*>(self)->attend(task, worker);
    }, this);
    if (plan.parts > 1)
      run_tasks(x.threads, plan.tasks, [](void* self, int64_t task, int) {
        static_cast<Attention*>(self)->join(task);
      }, this);
    return true;
  }

  // What a worker keeps in hand.
  struct Desk {
    Unit *k, *v, *across, *along, *q;
    float *scores, *c, **o, *scale;
    int64_t* place;
    Desk(const Plan& plan, char*& memory) {
      const int64_t n = padded(plan.width), d = lead<Unit>(plan.d);
      k = take<Unit>(memory, n * d), across = take<Unit>(memory, n * d);
      v = take<Unit>(memory, n * lead<Unit>(plan.dv)), along = take<Unit>(memory, units<Unit>(n) * padded(plan.dv));
      q = take<Unit>(memory, PANEL * d), scores = take<float>(memory, PANEL * n);
      c = take<float>(memory, PANEL * W), o = take<float*>(memory, PANEL), scale = take<float>(memory, W);
      place = take<int64_t>(memory, PANEL);
    }
  };

  State state(int64_t i) const { return State(plan, states + i * State::floats(plan)); }

  void attend(int64_t task, int worker) const {
    char* memory = scratch.of(worker);
    const Desk desk(plan, memory);
    store(desk.scale, all(x.scale * UNIT));
    const State own = plan.parts > 1 ? state(task) : State(plan, take<float>(memory, State::floats(plan)));
    const Chunk chunk = chunk_of(x, plan, task / plan.parts);
    own.clear((chunk.to - chunk.from) * plan.r, padded(plan.dv));
    const int64_t part = task % plan.parts;
    plan.apart ? apart(desk, own, chunk, part, memory) : together(desk, own, chunk, part, memory);
    if (plan.parts == 1) finish(own, chunk);
  }

  // Block after block, each for all tokens of the chunk that read it.
  void together(const Desk& desk, const State& own, const Chunk& chunk, int64_t part, char* memory) const {
    Visits visits(plan, memory);
    visits.find(x, plan, chunk);
    const int64_t end = visits.count * (part + 1) / plan.parts;
    for (int64_t i = visits.count * part / plan.parts; i < end; ++i) {
      const int64_t start = visits.block[i] * plan.block, stop = smaller(start + plan.block, chunk.in.s);
      const int64_t after = i + 1 < end ? visits.block[i + 1] * plan.block : chunk.in.s;
      Visit readers = visits.readers(i);
      for (int64_t from = start; from < stop; from += plan.width) {
        while (readers.count && chunk.in.position(*readers.tokens) < from) ++readers.tokens, --readers.count;
        if (!readers.count) break;
        const int64_t then = from + plan.width < stop ? from + plan.width : after;
        Ahead next;
        next.begin(x.k, x.v, chunk.in.batch, chunk.in.k0 + then, plan.groups.kv_head(chunk.group),
                   smaller(plan.width, chunk.in.s - then), readers.count * plan.r * 4 / WIDE_ROWS);
        visit(desk, own, chunk, {from, smaller(plan.width, stop - from), nullptr}, readers, next);
      }
    }
  }

  // Token after token, each with keys from here and there.
  void apart(const Desk& desk, const State& own, const Chunk& chunk, int64_t part, char* memory) const {
    Choice choice(plan.top_k * plan.block, memory);
    Ahead nothing{};
    for (int64_t i = chunk.from; i < chunk.to; ++i) {
      choice.find(x.blocks, chunk.group, chunk.in, i, plan.block);
      const int32_t token = int32_t(i);
      const int64_t end = choice.count * (part + 1) / plan.parts;
      for (int64_t from = choice.count * part / plan.parts; from < end; from += plan.width)
        visit(desk, own, chunk, {from, smaller(plan.width, end - from), choice.keys + from}, {&token, 1, &token + 1},
              nothing);
    }
  }

  // The rows of keys or values where they lie, if they lie as packing would lay them; else packed.
  Unit* rows_of(const View& y, bool may_lie, const Chunk& chunk, const Keys& keys, Unit* room, int64_t& step) const {
    constexpr int64_t width = UnitOf<Unit>::width;
    constexpr Kind own = width == 2 ? Kind::bf16 : Kind::f32;
    const int64_t token = chunk.in.k0 + keys.from, head = plan.groups.kv_head(chunk.group), n = keys.n;
    step = lead<Unit>(y.size[3]);
    if (keys.list) {
      pack_list(y, chunk.in.batch, chunk.in.k0, keys.list, head, n, room);
      return room;
    }
    if (may_lie && y.kind == own && n % PAD == 0 && step * width == y.size[3] && y.stride[3] == 1 &&
        y.stride[1] % width == 0) {
      step = y.stride[1] / width;
      return reinterpret_cast<Unit*>(at(y, chunk.in.batch, token, head));
    }
    pack_rows(y, chunk.in.batch, token, head, n, room);
    return room;
  }

  // Packs keys; the number of the first of them that is not finite, or of all.
  int64_t pack(const Desk& desk, const Chunk& chunk, const Keys& keys, const Unit*& along) const {
    const int64_t d = lead<Unit>(plan.d), dv = lead<Unit>(plan.dv), n = keys.n;
    int64_t k_step, v_step, bad = n;
    Unit* k = rows_of(x.k, true, chunk, keys, desk.k, k_step);
    Unit* v = rows_of(x.v, UnitOf<Unit>::width == 2, chunk, keys, desk.v, v_step);
    const bool bad_k = turn_watched(k, k_step, n, d, desk.across);
    if (!pair_watched(v, v_step, n, plan.dv, desk.along, &along) && !bad_k) return n;
    k = set_aside(k, k_step, n, d, desk.k);
    v = set_aside(v, v_step, n, dv, desk.v);
    for (int64_t i = n - 1; i >= 0; --i)
      if (spoilt_row(k + i * d, d) || spoilt_row(v + i * dv, dv)) {
        bad = i;
        std::memset(static_cast<void*>(k + i * d), 0, size_t(d) * 4);
        std::memset(static_cast<void*>(v + i * dv), 0, size_t(dv) * 4);
      }
    turn_watched(k, d, n, d, desk.across);
    pair_watched(v, dv, n, plan.dv, desk.along, &along);
    return bad;
  }

  // Some keys for those who read them.
  void visit(const Desk& desk, const State& own, const Chunk& chunk, const Keys& keys, const Visit& readers,
             Ahead& next) const {
    const Unit* along;
    const int64_t n = keys.n, bad = pack(desk, chunk, keys, along);
    const int64_t dv = padded(plan.dv), columns = padded(n), all_rows = readers.count * plan.r;
    for (int64_t row = 0; row < all_rows; row += PANEL) {
      const int64_t rows = smaller(PANEL, all_rows - row);
      gather(desk, own, chunk, readers, row, rows);
      const int64_t d = lead<Unit>(plan.d), all_units = units<Unit>(plan.d);
      for (int64_t u = 0; u == 0 || u < all_units; u += RUN)
        product<Unit>({desk.q + u, d, rows, desk.across + u * columns, columns, columns, smaller(RUN, all_units - u)},
                      FromZero{}, Scaled{desk.scores, columns, desk.scale, u > 0, next});
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = desk.place[i];
        const int64_t visible = keys.seen(chunk.in.position(chunk.from + at / plan.r));
        weigh<Unit>(desk.scores + i * columns, visible, columns, own.m[at], own.l[at], desk.c + i * W);
        if (bad < visible) own.l[at] = __builtin_nanf("");
      }
      product<Unit>({reinterpret_cast<const Unit*>(desk.scores), columns, rows, along, dv, dv, units<Unit>(n)},
                    FromZero{}, MovedOn{desk.o, desk.c, next});
    }
  }

  // Rows of q and places of O for rows row .. row + rows - 1 of the readers; what the next panel needs is asked for.
  void gather(const Desk& desk, const State& own, const Chunk& chunk, const Visit& readers, int64_t row,
              int64_t rows) const {
    const int64_t d = lead<Unit>(plan.d), dv = padded(plan.dv), r = plan.r, bytes = plan.d * bytes_of(x.q.kind);
    const int32_t *token = readers.tokens + row / r, *later = readers.tokens + (row + PANEL) / r;
    int64_t head = row % r, later_head = (row + PANEL) % r;
    for (int64_t i = 0; i < rows; ++i) {
      desk.place[i] = (*token - chunk.from) * r + head;
      desk.o[i] = own.o + desk.place[i] * dv;
      pack_row(query(chunk, *token, head), x.q.kind, x.q.stride[3], plan.d, desk.q + i * d);
      for (int64_t j = 0; j < dv; j += 16) __builtin_prefetch(desk.o[i] + j, 1, 2);
      if (later < readers.end)
        for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(query(chunk, *later, later_head) + j, 0, 2);
      if (++head == r) head = 0, ++token;
      if (++later_head == r) later_head = 0, ++later;
    }
  }
  const char* query(const Chunk& chunk, int64_t token, int64_t head) const {
    return at(x.q, chunk.in.batch, chunk.in.q0 + token, chunk.group * plan.r + head);
  }

  // Adds the later parts of a chunk to its first.
  void join(int64_t task) const {
    const Chunk chunk = chunk_of(x, plan, task);
    const State whole = state(task * plan.parts);
    const int64_t rows = (chunk.to - chunk.from) * plan.r, dv = padded(plan.dv);
    for (int64_t part = 1; part < plan.parts; ++part) {
      const State more = state(task * plan.parts + part);
      for (int64_t i = 0; i < rows; ++i) {
        if (more.l[i] < 0) continue;
        const float m = whole.m[i] > more.m[i] ? whole.m[i] : more.m[i], safe = m == -INF ? 0.0f : m;
        const V a = exp_of<Unit>(all(whole.m[i] - safe)), b = exp_of<Unit>(all(more.m[i] - safe));
        float weights[2 * W];
        store(weights, a), store(weights + W, b);
        whole.m[i] = m;
        whole.l[i] = (whole.l[i] < 0 ? 0.0f : whole.l[i]) * weights[0] + more.l[i] * weights[W];
        float* o = whole.o + i * dv;
        for (int64_t j = 0; j < dv; j += W) store(o + j, fma(load(o + j), a, mul(load(more.o + i * dv + j), b)));
      }
    }
    finish(whole, chunk);
  }

  void finish(const State& own, const Chunk& chunk) const {
    const int64_t dv = padded(plan.dv), r = plan.r;
    for (int64_t i = 0; i < (chunk.to - chunk.from) * r; ++i) {
      const int64_t token = chunk.in.q0 + chunk.from + i / r, head = chunk.group * r + i % r;
      const bool nothing = own.l[i] < 0;
      float* o = own.o + i * dv;
      if (!nothing)
        for (int64_t j = 0; j < dv; j += W) store(o + j, mul(load(o + j), all(1.0f / own.l[i])));
      narrow(o, at(x.out, chunk.in.batch, token, head), x.out.kind, x.out.stride[3], plan.dv);
      x.lse[(chunk.in.batch * plan.t + token) * plan.h + head] =
          nothing ? -INF : own.m[i] * (UNIT == 1.0f ? 1.0f : LN2) + __builtin_logf(own.l[i]);
    }
  }
};

}  // namespace

bool attend(const AttendArguments& x) {
  if (x.q.size[0] * x.q.size[1] * x.q.size[2] == 0) return true;
#if defined(OPENMSA_PAIRS)
  if (x.q.kind == Kind::bf16 && x.k.kind == Kind::bf16 && x.v.kind == Kind::bf16) return Attention<Pair>(x).run();
#endif
  return Attention<float>(x).run();
}

}  // namespace OPENMSA_ISA
}  // namespace openmsa
