// How the backward pass of attention is cut up: tiles of keys, chunks of query tokens, and who reads what.
#pragma once
#include "work.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

constexpr int64_t TILE = 128;        // keys at once
constexpr int64_t PANEL = 64;       // rows (a token, a head) at once
constexpr int64_t CHUNK = 4096;      // rows that a tile of keys meets before the next tile
constexpr int64_t RANGE = 16 << 20;  // bytes of dk and dv of the keys of a tile where tokens go apart
constexpr int64_t WAVE = 128 << 20;  // bytes of lists and delta at once

struct Tile {
  int64_t block, start, width;
};

// Tokens of a sequence, ascending: from a list, or one after the other.
struct Tokens {
  const int32_t* list;
  int64_t first, count;
  int64_t operator[](int64_t i) const { return list ? list[i] : first + i; }
  Tokens from(int64_t i) const { return {list ? list + i : list, list ? first : first + i, count - i}; }
  Tokens until(int64_t end) const {  // those below `end`
    if (!list) return {list, first, larger(0, smaller(count, end - first))};
    int64_t n = 0;
    while (n < count && list[n] < end) ++n;
    return {list, first, n};
  }
};

struct Call {
  const AttendBackwardArguments& x;
  Groups groups;
  int64_t t, s, d, dv, block_size;
  int64_t count;                     // sequences
  int64_t *tiles, *chunks, *blocks;  // numbers of them before each sequence
  int64_t per_block = 0;             // tiles of a block
  int64_t tile = 0, panel = 0;       // keys and rows that scratch has room for
  int64_t range = 0;                 // keys of a tile where tokens go apart, each with its own keys; else 0
  int64_t grid = 0, chunk = 0;       // tokens of a chunk: where panels end, and what is one task
  int64_t kv = 0, kvs = 0;           // this wave: first KV head, how many
  int64_t lists = 0;                 // lists of readers: one for each group of the wave, or one, or none
  float* delta = nullptr;            // [b * t][heads of the wave]
  float* share = nullptr;            // 1 / sum P, as delta; null: taken as 1
  int64_t* first = nullptr;          // [lists][blocks]
  int64_t* seen = nullptr;
  int32_t* tokens = nullptr;         // [lists][b * t][slots]

  bool exact() const { return x.q.kind == Kind::f32; }
  bool sparse() const { return x.blocks.data != nullptr; }
  int64_t slots() const { return sparse() ? x.blocks.size[3] : 0; }
  Sequence at(int64_t i) const { return sequence(x.borders, i, t, s); }
  int64_t all_tokens() const { return x.q.size[0] * t; }
  int64_t flat(const Sequence& q, int64_t token) const { return q.batch * t + q.q0 + token; }

  int64_t wave_groups() const { return kvs * groups.per_kv; }
  int64_t wave_heads() const { return wave_groups() * groups.heads; }
  int64_t wave_head() const { return kv * groups.per_kv * groups.heads; }
  int64_t in_wave(int64_t flat_token, int64_t head) const { return flat_token * wave_heads() + head - wave_head(); }
  int64_t key_tasks() const { return tiles[count] * kvs; }
  int64_t query_tasks() const { return chunks[count] * wave_groups(); }

  int64_t blocks_in(int64_t keys) const { return (keys + block_size - 1) / block_size; }
  int64_t tiles_in(int64_t keys) const {
    if (range) return (keys + range - 1) / range;
    return keys / block_size * per_block + (keys % block_size + TILE - 1) / TILE;
  }
  Tile tile_at(int64_t i, int64_t keys) const {
    if (range) return {0, i * range, smaller(range, keys - i * range)};
    const int64_t block = i / per_block, start = block * block_size + i % per_block * TILE;
    return {block, start, smaller(TILE, smaller((block + 1) * block_size, keys) - start)};
  }
  Readers readers(int64_t group, int64_t i) const {
    const int64_t list = lists == 1 ? 0 : group - kv * groups.per_kv;
    const int64_t place = list * (blocks[count] + count) + blocks[i] + i;
    return {first + place, tokens + (list * all_tokens() + flat(at(i), 0)) * slots(), seen + place};
  }
};

// Of a block's readers, or of the tokens from .. to - 1 where there are no lists, those that see the tile.
inline Tokens who(const Readers& readers, int64_t from, int64_t to, const Sequence& q, const Tile& tile) {
  if (!readers.first) {
    from = larger(from, tile.start - q.position(0));
    return {nullptr, from, larger(to - from, 0)};
  }
  const int64_t begin = readers.first[tile.block];
  const Tokens all{readers.tokens + begin, 0, readers.first[tile.block + 1] - begin};
  return all.from(all.until(tile.start - q.position(0)).count);
}

// Sizes of a call, and how many tasks each sequence gives. `before` has room for 3 lists of count + 1.
inline Call plan(const AttendBackwardArguments& x, int64_t* before) {
  const int64_t count = sequences(x.borders, x.q.size[0]);
  Call call{x, Groups(x.blocks, x.q.size[2], x.k.size[2]), x.q.size[1], x.k.size[1], x.q.size[3], x.v.size[3],
            x.blocks.data ? x.block_size : TILE, count, before, before + count + 1, before + 2 * (count + 1)};
  const int64_t heads = larger(call.groups.heads, 1), tasks = 4 * larger(x.threads, 1);
  call.per_block = (call.block_size + TILE - 1) / TILE;
  call.tile = padded(smaller(TILE, smaller(call.block_size, call.s)));
  if (call.sparse() && call.groups.apart(call.block_size, call.s)) {
    // So many that a token has about a tile of its keys among them, if there is room.
    const int64_t chosen = larger(1, call.slots() * call.block_size), most = RANGE / (4 * (call.d + call.dv));
    call.range = padded(larger(TILE, smaller(most, call.s / chosen * TILE)));
    call.tile = padded(smaller(TILE, call.s));
  }
  call.panel = smaller(PANEL, (call.t * heads + 31) / 32 * 32);
  call.grid = larger(1, smaller(CHUNK / heads, call.t));
  call.chunk = larger(1, smaller(call.grid, call.all_tokens() * call.groups.count / tasks));
  call.tiles[0] = call.chunks[0] = call.blocks[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Sequence q = call.at(i);
    call.tiles[i + 1] = call.tiles[i] + call.tiles_in(q.s);
    call.chunks[i + 1] = call.chunks[i] + (q.t + call.chunk - 1) / call.chunk;
    call.blocks[i + 1] = call.blocks[i] + call.blocks_in(q.s);
  }
  return call;
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

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
