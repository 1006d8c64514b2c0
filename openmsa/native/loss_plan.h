// How the index loss is cut up: pieces of queries, tiles of keys, and the room that they need.
#pragma once
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
  int64_t block = 0, parts = 0, tile = 0, width = 0;  // a block is `parts` tiles of `tile` keys, padded to `width`
  int64_t blocks = 0, reads = 0;                // blocks of the longest sequence; most that one token reads
  int64_t chunk = 0, batch = 0, dy_step = 0;    // tokens of a piece and of a product; units of a row of dY
  int64_t pieces = 0, slots = 0, slot_bytes = 0;  // in all, of a stretch, and what each takes

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
  Plan p{x, x.dq || x.dk, t, s, g, h / g, x.q.size[3], x.q_index.size[3]};
  const int64_t queries = longest(x.borders, x.borders.q, t), keys = longest(x.borders, x.borders.k, s);
  p.block = x.blocks.data ? x.block_size : TILE;
  const int64_t most = larger(smaller(p.block, keys), 1);
  p.parts = (most + TILE - 1) / TILE;
  p.tile = (most + p.parts - 1) / p.parts;
  p.width = padded(p.tile);
  p.blocks = (keys + p.block - 1) / p.block;
  p.reads = x.blocks.data ? smaller(x.blocks.size[3], p.blocks) : p.blocks;
  p.dy_step = p.parts * lead<Side>(p.width);
  // Long chunks share packed keys among more readers; short ones keep pieces small and many. The same with and
  // without gradients, and so the loss is.
  const int64_t token_bytes = larger(p.reads * (4 + p.dy_step * 4), 1);
  const int64_t fair = larger(64, smaller(256, x.q.size[0] * t * g / 64));
  const int64_t query_bytes = p.r * lead<Main>(p.d) * 4;
  p.chunk = larger(smaller(fair, PIECE_BYTES / larger(token_bytes, query_bytes)), 8);
  p.chunk = larger(smaller(smaller(p.chunk, STRETCH_BYTES / token_bytes), queries), 1);
  p.batch = smaller(larger(smaller(192 / p.r, 64), 1), p.chunk);
  p.pieces = g * count_tasks(x.borders, x.q.size[0], t, s, [&](const Sequence& q) { return p.chunks(q); });
  p.slot_bytes = (p.blocks * 16 + p.chunk * (p.wanted ? token_bytes : p.reads * 4) + 320) / 64 * 64;  // Readers and dY, each aligned
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

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
