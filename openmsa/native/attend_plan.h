// How attention is cut: chunks of query tokens, parts of what they read, and the blocks that a chunk visits.
#pragma once
#include "work.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

constexpr int64_t PIECE = 128;             // keys packed at a time
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
  bool apart;  // every token by itself with its own keys: short blocks have too little to share

  Plan(const AttendArguments& x)
      : b(x.q.size[0]), t(x.q.size[1]), h(x.q.size[2]), d(x.q.size[3]), s(x.k.size[1]), g(x.k.size[2]),
        dv(x.v.size[3]), block(x.blocks.data ? x.block_size : PIECE), top_k(x.blocks.data ? x.blocks.size[3] : 0),
        groups(x.blocks, h, g) {
    const int64_t most_q = longest(x.borders, x.borders.q, t), most_k = longest(x.borders, x.borders.k, s);
    r = groups.heads;
    apart = x.blocks.data && groups.apart(block, s);
    width = smaller(apart ? PIECE : smaller(block, PIECE), most_k);
    blocks = (most_k + block - 1) / block;
    const int64_t row = larger(1, r * padded(dv)), far = smaller(FAR, ALL / larger(1, x.threads));
    chunk = NEAR / row;
    if (x.blocks.data && !apart) chunk = larger(chunk, smaller(far / row, SHARED * blocks / larger(1, top_k)));
    chunk = larger(1, smaller(chunk, most_q));
    // A selection is cut by tokens first, it has little to share; a prefix is better read once by all tokens.
    const int64_t own = x.blocks.data ? b * t * groups.count : count(x.borders);
    const int64_t chosen = smaller(top_k, blocks);
    const int64_t finest = apart ? chosen * block / PIECE : x.blocks.data ? chosen / 4 : blocks / 8;
    parts = larger(1, smaller(finest, (ENOUGH + own - 1) / larger(1, own)));
    if (parts > 1 && x.blocks.data) chunk = 1;
    if (parts == 1)  // where a chunk is in parts, its size says where they meet and may not follow from threads
      while (chunk > 16 && count(x.borders) < 4 * x.threads) chunk = (chunk + 1) / 2;
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

// The tokens that read one block; `end` is past those of all blocks, that come next in memory.
struct Visit {
  const int32_t* tokens;
  int64_t count;
  const int32_t* end;
};

// The blocks that a chunk reads, ascending, and for each the tokens that read it, ascending.
struct Visits {
  int64_t count, *block, *first;
  int32_t* tokens;
  int64_t *places, *seen;
  bool dense;
  static int64_t bytes(const Plan& plan) {
    return (3 * plan.blocks + larger(FEW, plan.blocks) + 8) * 8 + plan.chunk * larger(plan.top_k, 1) * 4 + 5 * 64;
  }
  Visits(const Plan& plan, char*& memory)
      : block(take<int64_t>(memory, plan.blocks)), first(take<int64_t>(memory, plan.blocks + 1)),
        tokens(take<int32_t>(memory, plan.chunk * larger(plan.top_k, 1))),
        places(take<int64_t>(memory, larger(FEW, plan.blocks + 1))), seen(take<int64_t>(memory, plan.blocks)) {}

  void find(const AttendArguments& x, const Plan& plan, const Chunk& chunk) {
    const int64_t n = chunk.in.position(chunk.to - 1) / plan.block + 1;
    dense = !x.blocks.data;
    if (dense)
      everything(n, chunk);
    else if ((chunk.to - chunk.from) * plan.top_k <= FEW)
      sort(x.blocks, plan, chunk);
    else
      reverse(x.blocks, plan, chunk, n);
  }

  Visit readers(int64_t i) const {
    const int64_t stop = dense ? first[count] : first[i + 1];
    return {tokens + first[i], stop - first[i], tokens + first[count]};
  }

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

// Keys that one visit packs: one after the other from `from` on, or where a list says.
struct Keys {
  int64_t from, n;
  const int32_t* list;
  int64_t seen(int64_t position) const { return list ? n : smaller(n, position - from + 1); }
};

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
