// The gradients of attention, dense or over selected blocks. Nothing is kept from the forward pass but lse:
//
//     P = exp(scale * q . k - lse),  dX = P * (dP - delta),  dP = dout . v,  delta = dout . out
//     dv = P^T dout,  dk = scale * dX^T q,  dq = scale * dX K
//
// One thread takes a KV head whole and finds all three, chunk after chunk of tokens, where there are heads enough
// and room for dk and dv in fp32. Otherwise P and dX are worked out twice, once by chunks for dq, once by tiles of
// keys for dk and dv; every sum has the same terms in the same order as before.
//
// delta is sum P dP. It is summed over channels as the product that makes dP sums: over a single key, where
// out is v, the difference is exactly 0. In fp32 that is not as good as eager torch, whose weights sum to 1 and
// whose dX to 0 in the last place. There the chunks go first, and also find l = sum P, e = sum dX and sum P K:
//
//     P -> P / l,  delta -> delta + e / l,  dq = scale / l * (dX K - e / l * P K)
#include "backward_rows.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

constexpr int64_t DELTA_ROWS = 1024;
constexpr int64_t WHOLE = 160 << 20;  // bytes of dk and dv of the KV heads in work

// [keys][panel], keys as rows -> [n][keys in units], queries as rows.
inline void swap(float* x, int64_t keys, int64_t panel, int64_t n, float*, float* to) { turn(x, keys, panel, n, to); }
#if defined(OPENMSA_PAIRS)
inline void swap(Pair* x, int64_t keys, int64_t panel, int64_t n, Pair* paired, Pair* to) {
  pair_up(x, keys, panel, paired);
  turn(paired, units<Pair>(keys), panel, n, to);
}
#endif

inline void clear(float* x, int64_t count) { std::memset(x, 0, size_t(count) * 4); }

// Which gradients a task finds; how many keys it has dk and dv of.
struct Wanted {
  bool keys, queries;
  int64_t key_rows, blocks;
};

// A worker's scratch, and what it does.
template <class Unit>
struct Work {
  const Call& call;
  const Wanted wanted;
  const int64_t d = padded(call.d), dv_lead = padded(call.dv), chunk;  // chunk: rows
  Unit *k, *v, *k_along;
  float *dk, *dv, *dq;      // [keys][padded channels], [rows of the chunk][padded d]
  float *pk, *mass, *rest;  // of the chunk's rows: sum P K, sum P, sum dX, where the call is exact
  Unit *q_across, *dout_across, *q_along, *dout_along;
  float *p, *earlier;       // [tile][panel]; where channels are many, sums over those before
  Unit *to, *paired, *dx;   // [tile][panel] in units, and swapped
  Readers readers;          // of the chunk
  Choice choice;            // of a token that goes apart
  int64_t* place;           // of its keys among those that dk and dv are of
  Rows<Unit> rows;
  const Unit* k_b;

  Work(const Call& c, const Wanted& w, char*& memory)
      : call(c), wanted(w), chunk(w.queries ? (w.keys ? c.grid : c.chunk) * c.groups.heads : 0),
        k(take<Unit>(memory, c.tile * lead<Unit>(c.d))), v(take<Unit>(memory, c.tile * lead<Unit>(c.dv))),
        k_along(take<Unit>(memory, w.queries ? units<Unit>(c.tile) * d : 0)),
        dk(take<float>(memory, w.key_rows * d)), dv(take<float>(memory, w.key_rows * dv_lead)),
        dq(take<float>(memory, chunk * d)), pk(take<float>(memory, c.exact() ? chunk * d : 0)),
        mass(take<float>(memory, c.exact() ? chunk : 0)), rest(take<float>(memory, c.exact() ? chunk : 0)),
        q_across(take<Unit>(memory, c.panel * lead<Unit>(c.d))),
        dout_across(take<Unit>(memory, c.panel * lead<Unit>(c.dv))),
        q_along(take<Unit>(memory, w.keys ? units<Unit>(c.panel) * d : 0)),
        dout_along(take<Unit>(memory, w.keys ? units<Unit>(c.panel) * dv_lead : 0)),
        p(take<float>(memory, c.tile * c.panel)),
        earlier(take<float>(memory, larger(c.d, c.dv) > WIDE_CHAIN ? c.tile * c.panel : 0)),
        to(UnitOf<Unit>::width == 1 ? reinterpret_cast<Unit*>(p) : take<Unit>(memory, c.tile * c.panel)),
        paired(take<Unit>(memory, w.queries ? lead<Unit>(c.tile) * c.panel : 0)),
        dx(take<Unit>(memory, w.queries ? lead<Unit>(c.tile) * c.panel : 0)),
        readers{nullptr, nullptr, nullptr}, choice(c.range ? c.slots() * c.block_size : 0, memory),
        place(take<int64_t>(memory, c.range ? c.tile : 0)), rows(make_rows(c, w, memory)) {}

  // dk and dv of one tile; its readers come from the lists of the whole sequence.
  void by_keys(const Sequence& x, int64_t i, int64_t kv_head, const Tile& tile) {
    if (!call.range) pack(x, kv_head, tile, nullptr);
    clear(dk, tile.width * d);
    clear(dv, tile.width * dv_lead);
    for (int64_t n = 0; n < call.groups.per_kv; ++n) {
      const int64_t group = kv_head * call.groups.per_kv + n;
      if (call.range) {
        apart(x, group, 0, x.t, tile.start, tile.start + tile.width);
        continue;
      }
      Tokens tokens = who(call.lists ? call.readers(group, i) : readers, 0, x.t, x, tile);
      while (tokens.count) {
        const int64_t from = tokens[0] / call.grid * call.grid;
        const Tokens part = tokens.until(from + call.grid);
        panels(x, group, part, tile, from, dk, dv, nullptr);
        tokens = tokens.from(part.count);
      }
    }
    write(call.x.dk, x, tile.start, tile.width, kv_head, dk, call.x.scale);
    write(call.x.dv, x, tile.start, tile.width, kv_head, dv, 1.0f);
  }

  // dq of the tokens from .. end - 1; adds to dk and dv of the keys they read, if wanted.
  void by_queries(const Sequence& x, int64_t group, int64_t from, int64_t end) {
    const int64_t heads = call.groups.heads, rows_here = (end - from) * heads, keys = x.position(end - 1) + 1;
    clear(dq, rows_here * d);
    if (call.exact()) clear(pk, rows_here * d), clear(mass, rows_here), clear(rest, rows_here);
    if (call.range)
      apart(x, group, from, end, 0, keys);
    else if (call.sparse())
      find_readers(call.x.blocks, group, x, from, end, call.block_size, call.blocks_in(keys), readers);
    for (int64_t i = 0; !call.range && i < call.tiles_in(keys); ++i) {
      const Tile tile = call.tile_at(i, keys);
      const Tokens tokens = who(readers, from, end, x, tile);
      if (!tokens.count) continue;
      pack(x, call.groups.kv_head(group), tile, nullptr);
      panels(x, group, tokens, tile, from, dk + tile.start * d, dv + tile.start * dv_lead, nullptr);
    }
    for (int64_t i = 0; i < rows_here; ++i) {
      const int64_t token = from + i / heads, head = group * heads + i % heads;
      const float scale = call.exact() ? centre(call.in_wave(call.flat(x, token), head), i) : call.x.scale;
      write_row(call.x.dq, x.batch, x.q0 + token, head, dq + i * d, scale);
    }
  }

  // All three gradients of one KV head.
  void whole(const Sequence& x, int64_t kv_head) {
    clear(dk, x.s * d);
    clear(dv, x.s * dv_lead);
    for (int64_t n = 0; n < call.groups.per_kv; ++n)
      for (int64_t from = 0; from < x.t; from += call.grid)
        by_queries(x, kv_head * call.groups.per_kv + n, from, smaller(from + call.grid, x.t));
    write(call.x.dk, x, 0, x.s, kv_head, dk, call.x.scale);
    write(call.x.dv, x, 0, x.s, kv_head, dv, 1.0f);
  }

 private:
  Rows<Unit> make_rows(const Call& c, const Wanted& w, char*& memory) {
    if (w.queries && c.sparse() && !c.range) {
      readers.first = take<int64_t>(memory, w.blocks + 1);
      readers.seen = take<int64_t>(memory, w.blocks);
      readers.tokens = take<int32_t>(memory, (w.keys ? c.grid : c.chunk) * c.slots());
    }
    return Rows<Unit>(c, memory);
  }
  // Of the keys low .. high - 1 those that tokens from .. end - 1 read, token after token.
  void apart(const Sequence& x, int64_t group, int64_t from, int64_t end, int64_t low, int64_t high) {
    for (int64_t token = larger(from, low - x.position(0)); token < end; ++token) {
      choice.find(call.x.blocks, group, x, token, call.block_size);
      const int64_t stop = choice.before(high);
      for (int64_t i = choice.before(low); i < stop; i += TILE) {
        const Tile tile{0, 0, smaller(TILE, stop - i)};
        for (int64_t j = 0; j < tile.width; ++j) place[j] = choice.keys[i + j] - low;
        pack(x, call.groups.kv_head(group), tile, choice.keys + i);
        panels(x, group, {nullptr, token, 1}, tile, from, dk, dv, place);
      }
    }
  }
  // The keys of a tile, or those of a list.
  void pack(const Sequence& x, int64_t head, const Tile& tile, const int32_t* list) {
    const int64_t n = tile.width, k_lead = lead<Unit>(call.d), v_lead = lead<Unit>(call.dv);
    if (list) {
      pack_list(call.x.k, x.batch, x.k0, list, head, n, k);
      pack_list(call.x.v, x.batch, x.k0, list, head, n, v);
    } else {
      pack_rows(call.x.k, x.batch, x.k0 + tile.start, head, n, k);
      pack_rows(call.x.v, x.batch, x.k0 + tile.start, head, n, v);
    }
    for (int64_t i = 0; i < n; ++i)
      if (spoilt_row(k + i * k_lead, k_lead) || spoilt_row(v + i * v_lead, v_lead)) {
        std::memset(static_cast<void*>(k + i * k_lead), 0, size_t(k_lead) * 4);
        std::memset(static_cast<void*>(v + i * v_lead), 0, size_t(v_lead) * 4);
      }
    if (wanted.queries) k_b = pair_up(k, n, call.d, k_along);
  }
  // keys_at: which rows of dk_to and dv_to the tile's keys are, if not one after the other.
  void panels(const Sequence& x, int64_t group, const Tokens& tokens, const Tile& tile, int64_t from, float* dk_to,
              float* dv_to, const int64_t* keys_at) {
    for (int64_t row = 0; rows.gather(call, x, group, tokens, row, tile, from); row += call.panel) {
      turn(rows.q, rows.n, lead<Unit>(call.d), units<Unit>(call.d), q_across);
      turn(rows.dout, rows.n, lead<Unit>(call.dv), units<Unit>(call.dv), dout_across);
      score();
      if (wanted.keys) add_keys(pair_up(rows.dout, rows.n, call.dv, dout_along), call.dv, dv_to, keys_at);
      if (call.exact() && wanted.queries) add_queries(pk, mass);
      differentiate();
      if (wanted.keys) add_keys(pair_up(rows.q, rows.n, call.d, q_along), call.d, dk_to, keys_at);
      if (wanted.queries) add_queries(dq, call.exact() ? rest : nullptr);
    }
  }
  void score() { weigh<false>(k, call.d, q_across, call.x.scale * EXP_UNIT<Unit>); }
  void differentiate() { weigh<true>(v, call.dv, dout_across, 0.0f); }
  // The products of keys and rows over all channels, and what follows them.
  template <bool gradient>
  void weigh(const Unit* keys, int64_t channels, const Unit* across, float scale) {
    const int64_t all_units = units<Unit>(channels), columns = padded(rows.n), step = lead<Unit>(channels);
    const int64_t chain = UnitOf<Unit>::width == 1 ? WIDE_CHAIN : all_units;
    int64_t u = 0;
    for (; u + chain < all_units; u += chain) {
      if (u == 0) clear(earlier, call.tile * call.panel);
      product<Unit>({keys + u, step, rows.most, across + u * columns, columns, columns, chain}, FromZero{},
                    Add{{earlier, call.panel, nullptr}});
    }
    product<Unit>({keys + u, step, rows.most, across + u * columns, columns, columns, all_units - u}, FromZero{},
                  Weigh<Unit, gradient>{rows, scale, p, to, call.panel, u ? earlier : nullptr});
  }
  void add_keys(const Unit* along, int64_t channels, float* sums, const int64_t* keys_at) {
    const int64_t columns = padded(channels);
    accumulate<Unit>({to, units<Unit>(call.panel), rows.most, along, columns, columns, units<Unit>(rows.n)},
                     {sums, columns, keys_at});
  }
  void add_queries(float* sums, float* totals) {
    swap(to, rows.most, call.panel, rows.n, paired, dx);
    accumulate<Unit>({dx, lead<Unit>(rows.most), rows.n, k_b, d, d, units<Unit>(rows.most)}, {sums, d, rows.place});
    if (!totals) return;
    for (int64_t c = 0; c < rows.n; c += W) {
      V sum = zero();
      for (int64_t i = 0; i < rows.most; i += 16) {
        V part = zero();
        for (int64_t j = i; j < smaller(i + 16, rows.most); ++j) part = add(part, load(p + j * call.panel + c));
        sum = add(sum, part);
      }
      float lanes[W];
      store(lanes, sum);
      for (int64_t j = 0; j < smaller(W, rows.n - c); ++j) totals[rows.place[c + j]] += lanes[j];
    }
  }
  // Makes the weights of row i of the chunk sum to 1 and its dX to 0; returns what is left to multiply with.
  float centre(int64_t number, int64_t i) {
    if (mass[i] == 0.0f) return call.x.scale;
    const float share = 1.0f / mass[i], off = rest[i] * share;
    call.share[number] = share;
    call.delta[number] += off;
    float *row = dq + i * d, *from = pk + i * d;
    for (int64_t c = 0; c < d; c += W) store(row + c, fma(all(-off), load(from + c), load(row + c)));
    return call.x.scale * share;
  }
  static void write_row(const View& to, int64_t b, int64_t token, int64_t head, float* row, float scale) {
    for (int64_t c = 0; c < to.size[3]; c += W) store(row + c, mul(load(row + c), all(scale)));
    narrow(row, at(to, b, token, head), to.kind, to.stride[3], to.size[3]);
  }
  static void write(const View& to, const Sequence& x, int64_t start, int64_t n, int64_t head, float* sums,
                    float scale) {
    for (int64_t i = 0; i < n; ++i)
      write_row(to, x.batch, x.k0 + start + i, head, sums + i * padded(to.size[3]), scale);
  }
};

template <class Unit>
struct Run {
  Call call;
  Wanted keys{true, false, 0, 0}, queries{false, true, 0, 0}, both{true, true, 0, 0};
  bool is_whole = false;
  char* scratch = nullptr;
  int64_t each = 0;  // bytes of a worker

  static void prepare(void* context, int64_t task, int worker) {
    const Run& run = *static_cast<const Run*>(context);
    const Call& call = run.call;
    const int64_t finds = call.lists * call.count;
    if (task < finds) {
      const int64_t group = call.kv * call.groups.per_kv + task / call.count, i = task % call.count;
      const Sequence x = call.at(i);
      find_readers(call.x.blocks, group, x, 0, x.t, call.block_size, call.blocks_in(x.s), call.readers(group, i));
    } else {
      const int64_t row = (task - finds) * DELTA_ROWS, rows = call.all_tokens() * call.wave_heads();
      find_delta<Unit>(call, row, smaller(DELTA_ROWS, rows - row), run.scratch + worker * run.each);
    }
  }
  static void by_keys(void* context, int64_t task, int worker) {
    const Run& run = *static_cast<const Run*>(context);
    const Call& call = run.call;
    char* memory = run.scratch + worker * run.each;
    const int64_t number = task / call.kvs, i = find(call.tiles, call.count, number);
    const Sequence x = call.at(i);
    Work<Unit>(call, run.keys, memory)
        .by_keys(x, i, call.kv + task % call.kvs, call.tile_at(number - call.tiles[i], x.s));
  }
  static void by_queries(void* context, int64_t task, int worker) {
    const Run& run = *static_cast<const Run*>(context);
    const Call& call = run.call;
    char* memory = run.scratch + worker * run.each;
    task = call.query_tasks() - 1 - task;  // the last tokens, who may read most, first
    const int64_t number = task / call.wave_groups(), i = find(call.chunks, call.count, number);
    const Sequence x = call.at(i);
    const int64_t from = (number - call.chunks[i]) * call.chunk;
    Work<Unit>(call, run.queries, memory)
        .by_queries(x, call.kv * call.groups.per_kv + task % call.wave_groups(), from,
                    smaller(from + call.chunk, x.t));
  }
  static void whole(void* context, int64_t task, int worker) {
    const Run& run = *static_cast<const Run*>(context);
    char* memory = run.scratch + worker * run.each;
    const int64_t kvs = run.call.kvs;
    Work<Unit>(run.call, run.both, memory).whole(run.call.at(task / kvs), run.call.kv + task % kvs);
  }

  int64_t bytes(const Wanted& wanted) const {
    char *const start = reinterpret_cast<char*>(64), *end = start;
    const Work<Unit> work(call, wanted, end);
    return end - start;
  }
  // Whether KV heads are tasks enough, and their gradients small enough.
  bool heads_suffice(int threads) const {
    if (call.exact() || bytes(both) * threads > WHOLE) return false;
    int64_t total = 0, most = 0;
    for (int64_t i = 0; i < call.count; ++i) {
      const Sequence x = call.at(i);
      const int64_t work = x.t * (call.sparse() ? smaller(x.s, call.slots() * call.block_size) : x.s);
      total += work * call.x.k.size[2];
      most = larger(most, work);
    }
    const int64_t tasks = call.count * call.x.k.size[2], rounds = (tasks + threads - 1) / threads;
    if (!call.x.borders.count && rounds * threads * 4 <= tasks * 5) return true;
    return threads == 1 || most * threads * 4 <= total;
  }

  void wave(int threads) {
    const int64_t rows = call.wave_heads() * call.all_tokens();
    run_tasks(threads, call.lists * call.count + (rows + DELTA_ROWS - 1) / DELTA_ROWS, prepare, this);
    if (is_whole) return run_tasks(threads, call.count * call.kvs, whole, this);
    run_tasks(threads, call.query_tasks(), by_queries, this);
    run_tasks(threads, call.key_tasks(), by_keys, this);
  }
};

// As many KV heads at a time as the lists of readers and delta find room for.
template <class Unit>
bool run(const AttendBackwardArguments& x) {
  const int64_t g = x.k.size[2], threads = larger(1, x.threads);
  if (!g) return true;
  const Scratch before(1, (sequences(x.borders, x.q.size[0]) + 1) * 3 * 8);
  if (!before.memory) return false;
  Run<Unit> all{plan(x, reinterpret_cast<int64_t*>(before.memory))};
  Call& call = all.call;
  all.keys.key_rows = call.range ? smaller(call.range, padded(call.s)) : call.tile;
  for (int64_t i = 0; i < call.count; ++i) {
    all.both.key_rows = larger(all.both.key_rows, call.at(i).s);
    all.both.blocks = all.queries.blocks = larger(all.both.blocks, call.blocks_in(call.at(i).s));
  }
  all.is_whole = all.heads_suffice(int(threads));
  const bool shared = x.blocks.size[1] == 1, listed = call.sparse() && !all.is_whole && !call.range;
  const int64_t blocks = call.blocks[call.count] + call.count, slots = call.all_tokens() * call.slots();
  const int64_t list = listed ? blocks * 16 + slots * 4 : 0;
  const int64_t numbers = call.groups.heads * call.all_tokens() * (call.exact() ? 8 : 4);
  const int64_t kv_bytes = call.groups.per_kv * (numbers + (shared ? 0 : list));
  const int64_t kvs = larger(1, smaller(g, WAVE / larger(1, kv_bytes)));
  const Scratch wave(1, kvs * kv_bytes + (shared ? list : 0) + 512);
  const int64_t pass = larger(all.bytes(all.keys), all.bytes(all.queries));
  all.each = larger(48 * lead<Unit>(call.dv) * 4 + 256, all.is_whole ? all.bytes(all.both) : pass);
  const Scratch scratch(int(threads), all.each);
  all.scratch = scratch.memory;
  if (!wave.memory || !scratch.memory) return false;
  for (call.kv = 0; call.kv < g; call.kv += call.kvs) {
    char* memory = wave.memory;
    call.kvs = smaller(kvs, g - call.kv);
    call.lists = !listed ? 0 : shared ? 1 : call.wave_groups();
    call.delta = take<float>(memory, call.wave_heads() * call.all_tokens());
    call.share = call.exact() ? take<float>(memory, call.wave_heads() * call.all_tokens()) : nullptr;
    call.first = take<int64_t>(memory, call.lists * blocks);
    call.seen = take<int64_t>(memory, call.lists * blocks);
    call.tokens = take<int32_t>(memory, call.lists * slots);
    all.wave(int(threads));
  }
  return true;
}

}  // namespace

bool attend_backward(const AttendBackwardArguments& x) {
#if defined(OPENMSA_PAIRS)
  if (x.q.kind == Kind::bf16 && x.k.kind == Kind::bf16 && x.v.kind == Kind::bf16 && x.out.kind == Kind::bf16)
    return run<Pair>(x);
#endif
  return run<float>(x);
}

}  // namespace OPENMSA_ISA
}  // namespace openmsa
