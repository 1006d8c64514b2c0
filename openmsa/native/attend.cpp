// Attention over the visible keys of the selected blocks, or over every visible key: forward.
//
//   X = q K * scale;  m = max X;  P = exp(X - m);  l = sum P;  out = P V / l;  lse = m + log l
//
// A task is a chunk of query tokens with the heads of one group. It goes through the keys once, block by
// block: a block is packed, the rows that read it are gathered, and their m, l and O move on,
//
//   m' = max(m, max X);  c = exp(m - m');  l' = l c + sum P;  O' = O c + P V
//
// Few queries against many keys give too few tasks: then a task takes a part of its chunk's blocks, and the
// parts are put together in order. The parts follow from the sizes alone, so threads change no bit; the size
// of a chunk changes none either, for every row goes its own way through the same blocks.
#include "exponential.h"
#include "product.h"
#include "work.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

constexpr int64_t PIECE = 128;             // keys packed at a time
constexpr int64_t PANEL = 48;              // rows between two products
constexpr int64_t NEAR = 1 << 17;          // floats in the O of a chunk that stays in the second cache
constexpr int64_t FAR = 1 << 20;           // in the largest of a chunk whose tokens choose far apart
constexpr int64_t ALL = 1 << 25;           // in those of all threads
constexpr int64_t SHARED = 16;             // tokens that make packing a block worth while
constexpr int64_t ENOUGH = 64;             // tasks worth cutting smaller for
constexpr int64_t FEW = 128;               // places of a selection that are sorted rather than counted

// The sizes of a call and how it is cut.
struct Plan {
  int64_t b, t, h, d, s, g, dv, block, top_k, r, width, chunk, parts, blocks, tasks;
  Groups groups;

  Plan(const AttendArguments& x)
      : b(x.q.size[0]), t(x.q.size[1]), h(x.q.size[2]), d(x.q.size[3]), s(x.k.size[1]), g(x.k.size[2]),
        dv(x.v.size[3]), block(x.blocks.data ? x.block_size : PIECE), top_k(x.blocks.data ? x.blocks.size[3] : 0),
        groups(x.blocks, h, g) {
    const int64_t most_q = longest(x.borders, x.borders.q, t), most_k = longest(x.borders, x.borders.k, s);
    r = groups.heads;
    width = smaller(smaller(block, PIECE), most_k);
    blocks = (most_k + block - 1) / block;
    const int64_t row = larger(1, r * padded(dv)), far = smaller(FAR, ALL / larger(1, x.threads));
    chunk = NEAR / row;
    if (x.blocks.data) chunk = larger(chunk, smaller(far / row, SHARED * blocks / larger(1, top_k)));
    chunk = larger(1, smaller(chunk, most_q));
    // A selection is cut by tokens as long as there are any; a prefix is better read once by all tokens.
    const int64_t own = x.blocks.data ? b * t * groups.count : count(x.borders);
    const int64_t finest = x.blocks.data ? smaller(top_k, blocks) / 4 : blocks / 8;
    parts = larger(1, smaller(finest, (ENOUGH + own - 1) / larger(1, own)));
    while (chunk > 16 && count(x.borders) * parts < 4 * x.threads) chunk = (chunk + 1) / 2;
    tasks = count(x.borders);
  }
  int64_t chunks(const Sequence& x) const { return (x.t + chunk - 1) / chunk; }
  int64_t count(const Borders& borders) const {
    return count_tasks(borders, b, t, s, [&](const Sequence& x) { return chunks(x) * groups.count; });
  }
  int64_t rows() const { return chunk * r; }
};

// Query tokens from .. to - 1 of a sequence, and a group.
struct Chunk {
  Sequence in;
  int64_t group, from, to;
};
inline Chunk chunk_of(const AttendArguments& x, const Plan& plan, int64_t task) {
  const int64_t i = locate(x.borders, plan.b, plan.t, plan.s, task,
                           [&](const Sequence& y) { return plan.chunks(y) * plan.groups.count; });
  const Sequence in = sequence(x.borders, i, plan.t, plan.s);
  const int64_t n = plan.chunks(in);
  const int64_t from = (n - 1 - task % n) * plan.chunk;  // the latest queries have most to read
  return {in, task / n, from, smaller(from + plan.chunk, in.t)};
}

// Running m, l and O of a chunk's rows [tokens][heads]; l < 0: nothing read yet.
struct State {
  float *m, *l, *o;
  static int64_t floats(const Plan& plan) { return plan.rows() * (padded(plan.dv) + 2) + 3 * PAD; }
  State(const Plan& plan, float* memory) : m(memory), l(m + padded(plan.rows())), o(l + padded(plan.rows())) {}
  void clear(int64_t rows, int64_t columns) const {
    for (int64_t i = 0; i < rows; ++i) m[i] = -INF, l[i] = -1.0f;
    std::memset(o, 0, size_t(rows * columns) * 4);
  }
};

// The blocks that a chunk reads, ascending, and for each the tokens that read it, ascending.
struct Visits {
  int64_t count, *block, *first;
  int32_t* tokens;
  int64_t *places, *seen;
  static int64_t bytes(const Plan& plan) {
    return (3 * plan.blocks + larger(FEW, plan.blocks) + 8) * 8 + plan.chunk * larger(plan.top_k, 1) * 4 + 5 * 64;
  }
  Visits(const Plan& plan, char*& memory)
      : block(take<int64_t>(memory, plan.blocks)), first(take<int64_t>(memory, plan.blocks + 1)),
        tokens(take<int32_t>(memory, plan.chunk * larger(plan.top_k, 1))),
        places(take<int64_t>(memory, larger(FEW, plan.blocks + 1))), seen(take<int64_t>(memory, plan.blocks)) {}

  void find(const AttendArguments& x, const Plan& plan, const Chunk& chunk) {
    const int64_t n = chunk.in.position(chunk.to - 1) / plan.block + 1;
    if (!x.blocks.data)
      everything(n, chunk);
    else if ((chunk.to - chunk.from) * plan.top_k <= FEW)
      sort(x.blocks, plan, chunk);
    else
      reverse(x.blocks, plan, chunk, n);
  }
  const int32_t* readers(int64_t i) const { return tokens + (first ? first[i] : 0); }

 private:
  void everything(int64_t n, const Chunk& chunk) {
    for (int64_t i = chunk.from; i < chunk.to; ++i) tokens[i - chunk.from] = int32_t(i);
    for (count = 0; count < n; ++count) block[count] = count, first[count] = 0;
    first[n] = chunk.to - chunk.from;
  }
  void reverse(const Blocks& blocks, const Plan& plan, const Chunk& chunk, int64_t n) {
    find_readers(blocks, chunk.group, chunk.in, chunk.from, chunk.to, plan.block, n, {places, tokens, seen});
    count = 0;
    for (int64_t j = 0; j < n; ++j)
      if (places[j + 1] > places[j]) block[count] = j, first[count++] = places[j];
    first[count] = places[n];
  }
  void sort(const Blocks& blocks, const Plan& plan, const Chunk& chunk) {
    int64_t n = 0;
    for (int64_t i = chunk.from; i < chunk.to; ++i) {
      const int32_t* slots = blocks.data + chunk.in.batch * blocks.stride[0] +
                             (blocks.size[1] == 1 ? 0 : chunk.group) * blocks.stride[1] +
                             (chunk.in.q0 + i) * blocks.stride[2];
      for (int64_t slot = 0; slot < plan.top_k; ++slot) {
        const int64_t j = slots[slot * blocks.stride[3]];
        if (j < 0 || j > chunk.in.position(i) / plan.block) continue;
        const int64_t place = j << 32 | i;
        int64_t at = n;
        while (at > 0 && places[at - 1] > place) --at;
        if (at > 0 && places[at - 1] == place) continue;
        for (int64_t to = n++; to > at; --to) places[to] = places[to - 1];
        places[at] = place;
      }
    }
    count = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (i == 0 || places[i] >> 32 != block[count - 1]) block[count] = places[i] >> 32, first[count++] = i;
      tokens[i] = int32_t(places[i]);
    }
    first[count] = n;
  }
};

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
    return packed * 4 + Visits::bytes(plan) + (plan.parts == 1 ? State::floats(plan) * 4 : 0);
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
    Visits visits(plan, memory);
    const State own = plan.parts > 1 ? state(task) : State(plan, take<float>(memory, State::floats(plan)));
    const Chunk chunk = chunk_of(x, plan, task / plan.parts);
    own.clear((chunk.to - chunk.from) * plan.r, padded(plan.dv));
    visits.find(x, plan, chunk);
    const int64_t part = task % plan.parts, end = visits.count * (part + 1) / plan.parts;
    for (int64_t i = visits.count * part / plan.parts; i < end; ++i) {
      const int64_t start = visits.block[i] * plan.block, stop = smaller(start + plan.block, chunk.in.s);
      const int32_t* readers = visits.tokens + visits.first[i];
      int64_t count = x.blocks.data ? visits.first[i + 1] - visits.first[i] : chunk.to - chunk.from;
      for (int64_t from = start; from < stop; from += plan.width) {
        while (count && chunk.in.position(*readers) < from) ++readers, --count;
        if (!count) break;
        const int64_t then = from + plan.width < stop ? from + plan.width : i + 1 < end ? visits.block[i + 1] * plan.block : chunk.in.s;
        Ahead next;
        next.begin(x.k, x.v, chunk.in.batch, chunk.in.k0 + then, plan.groups.kv_head(chunk.group),
                   smaller(plan.width, chunk.in.s - then), count * plan.r * 4 / WIDE_ROWS);
        visit(desk, own, chunk, from, smaller(plan.width, stop - from), readers, count, visits.tokens + visits.first[visits.count], next);
      }
    }
    if (plan.parts == 1) finish(own, chunk);
  }

  // The rows of keys or values where they lie, if they lie as packing would lay them; else packed.
  Unit* rows_of(const View& y, bool there, const Chunk& chunk, int64_t from, int64_t n, Unit* room, int64_t& step) const {
    constexpr int64_t width = UnitOf<Unit>::width;
    constexpr Kind own = width == 2 ? Kind::bf16 : Kind::f32;
    const int64_t token = chunk.in.k0 + from, head = plan.groups.kv_head(chunk.group);
    step = lead<Unit>(y.size[3]);
    if (there && y.kind == own && n % PAD == 0 && y.stride[3] == 1 && y.stride[1] % width == 0 && step * width == y.size[3]) {
      step = y.stride[1] / width;
      return reinterpret_cast<Unit*>(at(y, chunk.in.batch, token, head));
    }
    pack_rows(y, chunk.in.batch, token, head, n, room);
    return room;
  }

  // Packs keys from .. from + n - 1; the first of them that is not finite, or n.
  int64_t pack(const Desk& desk, const Chunk& chunk, int64_t from, int64_t n, const Unit*& along) const {
    const int64_t d = lead<Unit>(plan.d), dv = lead<Unit>(plan.dv);
    int64_t k_step, v_step, bad = n;
    Unit* k = rows_of(x.k, true, chunk, from, n, desk.k, k_step);
    Unit* v = rows_of(x.v, UnitOf<Unit>::width == 2, chunk, from, n, desk.v, v_step);
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

  // Keys from .. from + n - 1 for those who read them.
  void visit(const Desk& desk, const State& own, const Chunk& chunk, int64_t from, int64_t n,
             const int32_t* readers, int64_t count, const int32_t* end, Ahead& next) const {
    const Unit* along;
    const int64_t bad = pack(desk, chunk, from, n, along);
    const int64_t dv = padded(plan.dv), columns = padded(n), all_rows = count * plan.r;
    for (int64_t row = 0; row < all_rows; row += PANEL) {
      const int64_t rows = smaller(PANEL, all_rows - row);
      gather(desk, own, chunk, readers, row, rows, end);
      // Short sums, added up: the error of a long one grows with its length.
      const int64_t d = lead<Unit>(plan.d), all_units = units<Unit>(plan.d);
      for (int64_t u = 0; u == 0 || u < all_units; u += PIECE)
        product<Unit>({desk.q + u, d, rows, desk.across + u * columns, columns, columns, smaller(PIECE, all_units - u)},
                      FromZero{}, Scaled{desk.scores, columns, desk.scale, u > 0, next});
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = desk.place[i];
        const int64_t visible = smaller(n, chunk.in.position(chunk.from + at / plan.r) - from + 1);
        weigh<Unit>(desk.scores + i * columns, visible, columns, own.m[at], own.l[at], desk.c + i * W);
        if (bad < visible) own.l[at] = __builtin_nanf("");
      }
      product<Unit>({reinterpret_cast<const Unit*>(desk.scores), columns, rows, along, dv, dv, units<Unit>(n)},
                    FromZero{}, MovedOn{desk.o, desk.c, next});
    }
  }

  // Rows of q and places of O for rows row .. row + rows - 1 of the readers; what the next panel needs is asked for.
  void gather(const Desk& desk, const State& own, const Chunk& chunk, const int32_t* readers, int64_t row,
              int64_t rows, const int32_t* end) const {
    const int64_t d = lead<Unit>(plan.d), dv = padded(plan.dv), r = plan.r, bytes = plan.d * bytes_of(x.q.kind);
    const int32_t *token = readers + row / r, *later = readers + (row + PANEL) / r;
    int64_t head = row % r, later_head = (row + PANEL) % r;
    for (int64_t i = 0; i < rows; ++i) {
      desk.place[i] = (*token - chunk.from) * r + head;
      desk.o[i] = own.o + desk.place[i] * dv;
      pack_row(query(chunk, *token, head), x.q.kind, x.q.stride[3], plan.d, desk.q + i * d);
      for (int64_t j = 0; j < dv; j += 16) __builtin_prefetch(desk.o[i] + j, 1, 2);
      if (later < end)
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
