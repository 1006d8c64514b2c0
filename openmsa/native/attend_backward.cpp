// The gradients of attention, dense or over selected blocks, in two passes that both work out anew
//
//     P = exp(scale * q . k - lse),  dX = P * (dP - delta),  dP = dout . v,  delta = dout . out
//
//   by queries   dq = scale * dX K        a chunk of tokens of a group: tiles of keys, then who reads them
//   by keys      dv = P^T dout            a tile of keys of a KV head: all rows that read it, in panels
//                dk = scale * dX^T q
//
// delta is sum P dP. It is summed over channels as the product that makes dP sums: over a single key, where
// out is v, the difference is exactly 0. In fp32 that is not as good as eager torch, whose weights sum to 1 and
// whose dX to 0 in the last place. There the first pass also finds l = sum P, e = sum dX and sum P K, and
//
//     P -> P / l,  delta -> delta + e / l,  dq = scale / l * (dX K - e / l * P K)
#include "exponential.h"
#include "product.h"
#include "work.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

constexpr int64_t TILE = 128;       // keys at once
constexpr int64_t PANEL = 128;      // rows (a token, a head) at once
constexpr int64_t CHUNK = 2048;     // rows whose dq is summed in scratch
constexpr int64_t CHAIN = 32;       // floats added one to the next before they join the others
constexpr int64_t WAVE = 128 << 20; // bytes of lists and delta at once

struct Tile {
  int64_t block, start, width;
};

// Tokens of a sequence, ascending: from a list, or one after the other.
struct Tokens {
  const int32_t* list;
  int64_t first, count;
  int64_t operator[](int64_t i) const { return list ? list[i] : first + i; }
};

struct Call {
  const AttendBackwardArguments& x;
  Groups groups;
  int64_t t, s, d, dv, block_size, per_block, chunk, panel, tile;
  int64_t count;                      // sequences
  int64_t *tiles, *chunks, *blocks;   // numbers of them before each sequence
  int64_t kv, kvs, lists;             // this wave: first KV head, how many, how many lists of readers
  float* delta;                       // [b * t][heads of the wave]
  float* share;                       // 1 / sum P, as delta; null: taken as 1
  int64_t* first;                     // [lists][blocks]
  int64_t* seen;
  int32_t* tokens;                    // [lists][b * t][slots]

  bool exact() const { return x.q.kind == Kind::f32; }
  bool sparse() const { return x.blocks.data != nullptr; }
  Sequence at(int64_t i) const { return sequence(x.borders, i, t, s); }
  int64_t flat(const Sequence& q, int64_t token) const { return q.batch * t + q.q0 + token; }
  int64_t wave_heads() const { return kvs * groups.per_kv * groups.heads; }
  int64_t wave_head() const { return kv * groups.per_kv * groups.heads; }
  int64_t in_wave(int64_t flat_token, int64_t head) const {
    return flat_token * wave_heads() + head - wave_head();
  }
  int64_t key_tasks() const { return tiles[count] * kvs; }
  int64_t query_tasks() const { return chunks[count] * kvs * groups.per_kv; }
  int64_t slots() const { return sparse() ? x.blocks.size[3] : 0; }

  int64_t tiles_in(int64_t keys) const {
    return keys / block_size * per_block + (keys % block_size + TILE - 1) / TILE;
  }
  int64_t blocks_in(int64_t keys) const { return (keys + block_size - 1) / block_size; }
  Tile tile_at(int64_t i, int64_t keys) const {
    const int64_t block = i / per_block, start = block * block_size + i % per_block * TILE;
    return {block, start, smaller(TILE, smaller((block + 1) * block_size, keys) - start)};
  }
  Readers readers(int64_t list, int64_t i) const {
    const int64_t place = list * (blocks[count] + count) + blocks[i] + i;
    return {first + place, tokens + (list * x.q.size[0] * t + flat(at(i), 0)) * slots(), seen + place};
  }
};

// Of the readers of a block, or of tokens from .. to - 1, those that see the tile's first key.
inline Tokens who(const Readers& readers, const Sequence& q, const Tile& tile) {
  Tokens out{readers.tokens, readers.first[tile.block], readers.first[tile.block + 1]};
  while (out.first < out.count && q.position(out.list[out.first]) < tile.start) ++out.first;
  return {out.list + out.first, 0, out.count - out.first};
}
inline Tokens who(int64_t from, int64_t to, const Sequence& q, const Tile& tile) {
  from = larger(from, tile.start - q.position(0));
  return {nullptr, from, larger(to - from, 0)};
}

// A panel of query rows, and what goes with each.
template <class Unit>
struct Rows {
  Unit *q, *dout;     // [panel][lead]
  float *low, *delta, *share; // low: -lse, in the units of exp_of
  float* limit;       // how many of the tile's keys it sees
  int64_t* place;     // its number in the chunk
  int64_t n, most;    // rows; the largest limit

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
      pack_row(at(dout_in, x.batch, x.q0 + token, head), dout_in.kind, dout_in.stride[3],
               call.dv, dout_to);
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

// What follows a product of scores (P from X) and one of dP (dX from P and dP): p is [..][step] in floats,
// `to` the same in units; for floats both are one. Queries are rows, or columns if `turned`.
template <class Unit, bool turned, bool gradient>
struct Weigh {
  const Rows<Unit>& rows;
  float scale;
  float* p;
  Unit* to;
  int64_t step;

  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&x)[R][N], int64_t row, int64_t column) const {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < N; ++j) {
        const int64_t c = column + j * W, query = turned ? c : row + i;
        float* here = p + (row + i) * step + c;
        V y;
        if constexpr (gradient)
          y = mul(load(here), sub(x[i][j], of(rows.delta + query)));
        else
          y = exp_of<Unit>(fma(x[i][j], all(scale), of(rows.low + query)));
        if constexpr (turned && !gradient && UnitOf<Unit>::width == 1) y = mul(y, load(rows.share + query));
        if constexpr (turned)
          y = where_le(all(float(row + i + 1)), load(rows.limit + query), y, zero());
        else
          y = first(y, int64_t(rows.limit[query]) - c, zero());
        if constexpr (!gradient) store(here, y);
        if constexpr (gradient || (turned && UnitOf<Unit>::width > 1))
          put(to + (row + i) * step / UnitOf<Unit>::width, c, y);
      }
  }
  static inline __attribute__((always_inline)) V of(const float* x) { return turned ? load(x) : all(*x); }
};

// Adds a product to rows of `c`, those at `place` if it is given. To start from what is there would make one
// long chain of sums, whose roundings add up.
struct Add {
  float* c;
  int64_t step;
  const int64_t* place;
  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&sums)[R][N], int64_t row, int64_t column) const {
    for (int i = 0; i < R; ++i) {
      float* there = c + (place ? place[row + i] : row + i) * step + column;
      for (int j = 0; j < N; ++j) store(there + j * W, add(load(there + j * W), sums[i][j]));
    }
  }
};

template <class Unit>
__attribute__((noinline)) void accumulate(const Operands<Unit>& x, const Add& add) {
  const int64_t chain = UnitOf<Unit>::width == 1 ? CHAIN : x.n;
  for (int64_t u = 0; u < x.n; u += chain)
    product<Unit>({x.a + u, x.a_step, x.rows, x.b + u * x.b_step, x.b_step, x.columns, smaller(chain, x.n - u)},
                  FromZero{}, add);
}

// dk and dv of one tile of keys.
template <class Unit>
struct KeyPass {
  Unit *k, *v;                          // rows
  float *dk, *dv;                       // [tile][padded channels]
  Unit *q_across, *dout_across, *q_along, *dout_along;
  float* p;                             // [tile][panel]
  Unit* to;
  Rows<Unit> rows;

  KeyPass(const Call& call, char*& memory)
      : k(take<Unit>(memory, call.tile * lead<Unit>(call.d))),
        v(take<Unit>(memory, call.tile * lead<Unit>(call.dv))),
        dk(take<float>(memory, call.tile * padded(call.d))),
        dv(take<float>(memory, call.tile * padded(call.dv))),
        q_across(take<Unit>(memory, lead<Unit>(call.d) * call.panel)),
        dout_across(take<Unit>(memory, lead<Unit>(call.dv) * call.panel)),
        q_along(take<Unit>(memory, units<Unit>(call.panel) * padded(call.d))),
        dout_along(take<Unit>(memory, units<Unit>(call.panel) * padded(call.dv))),
        p(take<float>(memory, call.tile * call.panel)),
        to(UnitOf<Unit>::width == 1 ? reinterpret_cast<Unit*>(p) : take<Unit>(memory, call.tile * call.panel)),
        rows(call, memory) {}

  void run(const Call& call, const Sequence& x, int64_t i, int64_t kv_head, const Tile& tile) {
    pack_rows(call.x.k, x.batch, x.k0 + tile.start, kv_head, tile.width, k);
    pack_rows(call.x.v, x.batch, x.k0 + tile.start, kv_head, tile.width, v);
    std::memset(dk, 0, size_t(tile.width * padded(call.d)) * 4);
    std::memset(dv, 0, size_t(tile.width * padded(call.dv)) * 4);
    for (int64_t n = 0; n < call.groups.per_kv; ++n) {
      const int64_t group = kv_head * call.groups.per_kv + n, list = group - call.kv * call.groups.per_kv;
      const Tokens tokens = call.sparse() ? who(call.readers(call.lists == 1 ? 0 : list, i), x, tile)
                                          : who(0, x.t, x, tile);
      for (int64_t row = 0; rows.gather(call, x, group, tokens, row, tile, 0); row += call.panel) add_panel(call);
    }
    write(call.x.dk, x, tile, kv_head, dk, call.d, call.x.scale);
    write(call.x.dv, x, tile, kv_head, dv, call.dv, 1.0f);
  }

 private:
  void add_panel(const Call& call) {
    const int64_t n = rows.n, keys = rows.most, columns = padded(n), step = call.panel;
    const int64_t d = units<Unit>(call.d), dv_units = units<Unit>(call.dv), count = units<Unit>(n);
    const int64_t p_step = step / UnitOf<Unit>::width;
    turn(rows.q, n, lead<Unit>(call.d), d, q_across);
    turn(rows.dout, n, lead<Unit>(call.dv), dv_units, dout_across);
    const Unit* q_b = pair_up(rows.q, n, call.d, q_along);
    const Unit* dout_b = pair_up(rows.dout, n, call.dv, dout_along);
    product<Unit>({k, lead<Unit>(call.d), keys, q_across, columns, columns, d}, FromZero{},
                  Weigh<Unit, true, false>{rows, call.x.scale * EXP_UNIT<Unit>, p, to, step});
    accumulate<Unit>({to, p_step, keys, dout_b, padded(call.dv), padded(call.dv), count}, {dv, padded(call.dv), nullptr});
    product<Unit>({v, lead<Unit>(call.dv), keys, dout_across, columns, columns, dv_units}, FromZero{},
                  Weigh<Unit, true, true>{rows, 0.0f, p, to, step});
    accumulate<Unit>({to, p_step, keys, q_b, padded(call.d), padded(call.d), count}, {dk, padded(call.d), nullptr});
  }
  static void write(const View& to, const Sequence& x, const Tile& tile, int64_t head, float* from, int64_t d,
                    float scale) {
    for (int64_t i = 0; i < tile.width; ++i) {
      float* row = from + i * padded(d);
      for (int64_t c = 0; c < padded(d); c += W) store(row + c, mul(load(row + c), all(scale)));
      narrow(row, at(to, x.batch, x.k0 + tile.start + i, head), to.kind, to.stride[3], d);
    }
  }
};

// dq of one chunk of tokens.
template <class Unit>
struct QueryPass {
  Readers readers;
  float *dq, *pk;     // [chunk * heads][padded d]; pk and the next two only where the call is exact
  float *mass, *rest; // [chunk * heads], sum P and sum dX
  Unit *k, *v, *k_across, *v_across, *k_along;
  float* p;   // [panel][tile]
  Unit* to;
  Rows<Unit> rows;

  QueryPass(const Call& call, int64_t blocks, char*& memory)
      : readers{take<int64_t>(memory, blocks + 1), take<int32_t>(memory, call.chunk * call.slots()),
                take<int64_t>(memory, blocks)},
        dq(take<float>(memory, call.chunk * call.groups.heads * padded(call.d))),
        pk(take<float>(memory, call.exact() ? call.chunk * call.groups.heads * padded(call.d) : 0)),
        mass(take<float>(memory, call.exact() ? call.chunk * call.groups.heads : 0)),
        rest(take<float>(memory, call.exact() ? call.chunk * call.groups.heads : 0)),
        k(take<Unit>(memory, call.tile * lead<Unit>(call.d))),
        v(take<Unit>(memory, call.tile * lead<Unit>(call.dv))),
        k_across(take<Unit>(memory, call.tile * lead<Unit>(call.d))),
        v_across(take<Unit>(memory, call.tile * lead<Unit>(call.dv))),
        k_along(take<Unit>(memory, units<Unit>(call.tile) * padded(call.d))),
        p(take<float>(memory, call.tile * call.panel)),
        to(UnitOf<Unit>::width == 1 ? reinterpret_cast<Unit*>(p) : take<Unit>(memory, call.tile * call.panel)),
        rows(call, memory) {}

  void run(const Call& call, const Sequence& x, int64_t group, int64_t from) {
    const int64_t heads = call.groups.heads, end = smaller(from + call.chunk, x.t);
    const int64_t keys = x.position(end - 1) + 1, step = padded(call.d);
    std::memset(dq, 0, size_t((end - from) * heads * step) * 4);
    if (call.exact()) {
      std::memset(pk, 0, size_t((end - from) * heads * step) * 4);
      std::memset(mass, 0, size_t((end - from) * heads) * 4);
      std::memset(rest, 0, size_t((end - from) * heads) * 4);
    }
    if (call.sparse())
      find_readers(call.x.blocks, group, x, from, end, call.block_size, call.blocks_in(keys), readers);
    for (int64_t i = 0; i < call.tiles_in(keys); ++i) {
      const Tile tile = call.tile_at(i, keys);
      const Tokens tokens = call.sparse() ? who(readers, x, tile) : who(from, end, x, tile);
      if (!tokens.count) continue;
      pack(call, x, call.groups.kv_head(group), tile);
      for (int64_t row = 0; rows.gather(call, x, group, tokens, row, tile, from); row += call.panel)
        add_panel(call, padded(tile.width));
    }
    const View& out = call.x.dq;
    for (int64_t i = 0; i < (end - from) * heads; ++i) {
      float* row = dq + i * step;
      const float scale = call.exact() ? centre(call, call.in_wave(call.flat(x, from + i / heads), group * heads + i % heads), i) : call.x.scale;
      for (int64_t c = 0; c < step; c += W) store(row + c, mul(load(row + c), all(scale)));
      narrow(row, at(out, x.batch, x.q0 + from + i / heads, group * heads + i % heads), out.kind, out.stride[3],
             call.d);
    }
  }

 private:
  void pack(const Call& call, const Sequence& x, int64_t head, const Tile& tile) {
    const int64_t n = tile.width, k_lead = lead<Unit>(call.d), v_lead = lead<Unit>(call.dv);
    pack_rows(call.x.k, x.batch, x.k0 + tile.start, head, n, k);
    pack_rows(call.x.v, x.batch, x.k0 + tile.start, head, n, v);
    for (int64_t i = 0; i < n; ++i)
      if (spoilt_row(k + i * k_lead, k_lead) || spoilt_row(v + i * v_lead, v_lead)) {
        std::memset(static_cast<void*>(k + i * k_lead), 0, size_t(k_lead) * 4);
        std::memset(static_cast<void*>(v + i * v_lead), 0, size_t(v_lead) * 4);
      }
    turn(k, n, k_lead, units<Unit>(call.d), k_across);
    turn(v, n, v_lead, units<Unit>(call.dv), v_across);
    k_b = pair_up(k, n, call.d, k_along);
  }
  // Makes the weights of row i sum to 1 and its dX to 0; returns what is left to multiply with.
  float centre(const Call& call, int64_t number, int64_t i) {
    call.share[number] = 1.0f;
    if (mass[i] == 0.0f) return call.x.scale;
    const int64_t step = padded(call.d);
    const float share = 1.0f / mass[i], off = rest[i] * share;
    call.share[number] = share;
    call.delta[number] += off;
    for (float *to = dq + i * step, *from = pk + i * step, *end = to + step; to < end; to += W, from += W)
      store(to, fma(all(-off), load(from), load(to)));
    return call.x.scale * share;
  }
  void count(const Call& call, int64_t columns, float* to) {
    for (int64_t i = 0; i < rows.n; ++i) {
      V sum = zero();
      for (int64_t c = 0; c < columns; c += W) sum = add(sum, load(p + i * call.tile + c));
      to[rows.place[i]] += sum_of(sum);
    }
  }
  void add_panel(const Call& call, int64_t b_step) {
    const int64_t keys = rows.most, columns = padded(keys), step = call.tile;
    const Operands<Unit> right{to, step / UnitOf<Unit>::width, rows.n, k_b, padded(call.d), padded(call.d), units<Unit>(keys)};
    product<Unit>({rows.q, lead<Unit>(call.d), rows.n, k_across, b_step, columns, units<Unit>(call.d)}, FromZero{},
                  Weigh<Unit, false, false>{rows, call.x.scale * EXP_UNIT<Unit>, p, to, step});
    if (call.exact()) {
      count(call, columns, mass);
      accumulate(right, Add{pk, padded(call.d), rows.place});
    }
    product<Unit>({rows.dout, lead<Unit>(call.dv), rows.n, v_across, b_step, columns, units<Unit>(call.dv)},
                  FromZero{}, Weigh<Unit, false, true>{rows, 0.0f, p, to, step});
    if (call.exact()) count(call, columns, rest);
    accumulate(right, Add{dq, padded(call.d), rows.place});
  }
  const Unit* k_b;
};

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
  }
}

// The sequence of a task: the last i with before[i] <= task.
inline int64_t find(const int64_t* before, int64_t count, int64_t task) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (before[middle] <= task ? low : high) = middle;
  }
  return low;
}

constexpr int64_t DELTA_ROWS = 1024;

template <class Unit>
struct Run {
  const Call& call;
  const Scratch& scratch;
  int64_t first_task;

  static void prepare(void* context, int64_t task, int worker) {
    const Run& run = *static_cast<const Run*>(context);
    const Call& call = run.call;
    const int64_t finds = call.lists * call.count;
    if (task < finds) {
      const int64_t list = task / call.count, i = task % call.count;
      const Sequence x = call.at(i);
      find_readers(call.x.blocks, call.kv * call.groups.per_kv + list, x, 0, x.t, call.block_size,
                   call.blocks_in(x.s), call.readers(list, i));
    } else {
      const int64_t row = (task - finds) * DELTA_ROWS, rows = call.x.q.size[0] * call.t * call.wave_heads();
      find_delta<Unit>(call, row, smaller(DELTA_ROWS, rows - row), run.scratch.of(worker));
    }
  }
  static void differentiate(void* context, int64_t task, int worker) {
    const Run& run = *static_cast<const Run*>(context);
    const Call& call = run.call;
    char* memory = run.scratch.of(worker);
    const int64_t by_keys = call.key_tasks(), groups = call.kvs * call.groups.per_kv;
    task += run.first_task;
    if (task < by_keys) {
      const int64_t i = find(call.tiles, call.count, task / call.kvs);
      const Sequence x = call.at(i);
      KeyPass<Unit>(call, memory)
          .run(call, x, i, call.kv + task % call.kvs, call.tile_at(task / call.kvs - call.tiles[i], x.s));
    } else {  // the last tokens, who may read most, first
      task = call.chunks[call.count] * groups - 1 - (task - by_keys);
      const int64_t i = find(call.chunks, call.count, task / groups);
      const Sequence x = call.at(i);
      QueryPass<Unit>(call, call.blocks_in(x.s), memory)
          .run(call, x, call.kv * call.groups.per_kv + task % groups, (task / groups - call.chunks[i]) * call.chunk);
    }
  }
};

// Sizes of a call, and how many tasks each sequence gives. `before` has room for 3 lists of count + 1.
Call plan(const AttendBackwardArguments& x, int64_t* before, int threads) {
  Call call{x, Groups(x.blocks, x.q.size[2], x.k.size[2]), x.q.size[1], x.k.size[1], x.q.size[3], x.v.size[3],
            x.blocks.data ? x.block_size : TILE, 0, 0, 0, 0, sequences(x.borders, x.q.size[0]),
            before, nullptr, nullptr, 0, 0, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  const int64_t heads = larger(call.groups.heads, 1), tokens = x.q.size[0] * call.t;
  call.per_block = (call.block_size + TILE - 1) / TILE;
  call.tile = padded(smaller(TILE, smaller(call.block_size, call.s)));
  call.panel = smaller(PANEL, padded(call.t * heads));
  call.chunk = larger(1, smaller(CHUNK / heads, tokens * call.groups.count / (4 * larger(threads, 1))));
  call.chunk = smaller(call.chunk, call.t);
  call.chunks = before + call.count + 1;
  call.blocks = call.chunks + call.count + 1;
  call.tiles[0] = call.chunks[0] = call.blocks[0] = 0;
  for (int64_t i = 0; i < call.count; ++i) {
    const Sequence q = call.at(i);
    call.tiles[i + 1] = call.tiles[i] + call.tiles_in(q.s);
    call.chunks[i + 1] = call.chunks[i] + (q.t + larger(call.chunk, 1) - 1) / larger(call.chunk, 1);
    call.blocks[i + 1] = call.blocks[i] + call.blocks_in(q.s);
  }
  return call;
}

template <class Unit>
int64_t scratch_bytes(const Call& call) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < call.count; ++i) blocks = larger(blocks, call.blocks[i + 1] - call.blocks[i]);
  char* const start = reinterpret_cast<char*>(64);
  char *keys = start, *queries = start, *delta = start;
  KeyPass<Unit> by_keys(call, keys);
  QueryPass<Unit> by_queries(call, blocks, queries);
  take<Unit>(delta, 3 * 16 * lead<Unit>(call.dv) + 64);
  return larger(delta - start, larger(keys - start, queries - start));
}

// As many KV heads at a time as the lists of readers and delta find room for.
template <class Unit>
bool run(const AttendBackwardArguments& x) {
  if (!x.k.size[2]) return true;
  const Scratch borders(1, (sequences(x.borders, x.q.size[0]) + 1) * 3 * 8);
  if (!borders.memory) return false;
  Call call = plan(x, reinterpret_cast<int64_t*>(borders.memory), x.threads);
  const int64_t tokens = x.q.size[0] * call.t, g = x.k.size[2], per_kv = call.groups.per_kv;
  const int64_t blocks = call.blocks[call.count] + call.count, slots = tokens * call.slots();
  const int64_t list = call.sparse() ? blocks * 16 + slots * 4 : 0;
  const bool shared = x.blocks.size[1] == 1;
  const int64_t numbers = tokens * call.groups.heads * (call.exact() ? 8 : 4);
  const int64_t each = per_kv * (numbers + (shared ? 0 : list)) + 1;
  const int64_t most = larger(1, smaller(g, WAVE / each));
  const int64_t lists = !call.sparse() ? 0 : shared ? 1 : most * per_kv;
  const Scratch wave(1, most * per_kv * numbers + lists * (slots * 4 + blocks * 16) + 512);
  const int threads = int(smaller(larger(x.threads, 1), (call.tiles[call.count] + call.chunks[call.count] * per_kv) * g));
  const Scratch scratch(int(larger(threads, 1)), scratch_bytes<Unit>(call));
  if (!wave.memory || !scratch.memory) return false;
  for (call.kv = 0; call.kv < g; call.kv += call.kvs) {
    char* memory = wave.memory;
    call.kvs = smaller(most, g - call.kv);
    call.lists = lists > 1 ? call.kvs * per_kv : lists;
    call.delta = take<float>(memory, call.wave_heads() * tokens);
    call.share = call.exact() ? take<float>(memory, call.wave_heads() * tokens) : nullptr;
    call.first = take<int64_t>(memory, call.lists * blocks);
    call.seen = take<int64_t>(memory, call.lists * blocks);
    call.tokens = take<int32_t>(memory, call.lists * slots);
    Run<Unit> all{call, scratch, 0};
    const int64_t rows = call.wave_heads() * tokens;
    run_tasks(threads, call.lists * call.count + (rows + DELTA_ROWS - 1) / DELTA_ROWS, Run<Unit>::prepare, &all);
    if (call.exact()) {  // what the queries find, the keys need
      all.first_task = call.key_tasks();
      run_tasks(threads, call.query_tasks(), Run<Unit>::differentiate, &all);
      all.first_task = 0;
      run_tasks(threads, call.key_tasks(), Run<Unit>::differentiate, &all);
    } else {
      run_tasks(threads, call.key_tasks() + call.query_tasks(), Run<Unit>::differentiate, &all);
    }
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
