// How a call of select is cut, and how its queries and keys come into the panels.
#pragma once
#include "work.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

constexpr int64_t PANEL = WIDE * W > PAD ? WIDE * W : PAD;  // columns that are turned and multiplied together
constexpr int64_t PIECE = 128;                              // keys multiplied at once, about
constexpr int64_t COLUMNS = 256;                            // of a task, at most
constexpr int64_t FEW = 8;                                  // rows past which keys are streamed as they lie
constexpr int64_t BEST_BYTES = 4 << 20;                     // of a task's maxima, if 16 columns fit
constexpr int64_t CALL_BYTES = 160 << 20;                   // of a call's

// How a call is cut: chunks of `columns` rows, each over `ranges` equal ranges of its blocks.
struct Cut {
  int64_t columns, chunks, ranges, blocks;  // blocks of the longest sequence, a multiple of PAD
  int64_t best_size() const { return blocks * columns; }
};

// Enough tasks for the threads: narrower chunks, then ranges of blocks. No thread wakes for a small call.
inline Cut cut_call(const SelectArguments& a, int64_t unit_count, int* threads) {
  const View &q = a.q_index, &k = a.k_index;
  const int64_t g = q.size[2], t = longest(a.borders, a.borders.q, q.size[1]);
  const int64_t s = longest(a.borders, a.borders.k, k.size[1]);
  const int64_t blocks = padded((s + a.block_size - 1) / a.block_size), rows = padded(t * g);
  const double work = double(rows) * double(s) * double(unit_count) * double(sequences(a.borders, q.size[0]));
  *threads = int(smaller(a.threads, int64_t(work / (1 << 22)) + 1));
  const auto count = [&](int64_t columns) {
    return count_tasks(a.borders, q.size[0], q.size[1], k.size[1],
                       [&](const Sequence& x) { return (x.t * g + columns - 1) / columns; });
  };
  int64_t columns = smaller(COLUMNS, larger(PAD, rows));
  while (columns > PAD && blocks * columns * 4 > BEST_BYTES) columns = padded(columns / 2);
  while (*threads > 1 && columns > 64 && count(columns) < *threads * 4) columns = padded(columns / 2);
  const int64_t chunks = count(columns);
  int64_t ranges = 1;
  if (*threads > 1 && chunks > 0 && chunks < *threads * 2)
    ranges = larger(1, smaller(smaller(*threads * 4 / chunks, blocks), int64_t(work / (1 << 20)) / chunks));
  return {columns, chunks, ranges, blocks};
}

template <class Unit>
struct Job {
  const SelectArguments* a;
  Cut cut;
  int64_t d, g, lead, take;  // take: keys at once
  bool dense, in_place;      // a key's channels lie together and fill their lanes; and are units where they are
  float scale;
  char* shared;      // maxima of the chunks of a wave, if a chunk has several ranges
  int64_t wave;      // its first chunk
  const Scratch* scratch;
};

// Rows first .. first + count - 1 of a sequence.
struct Chunk {
  Sequence x;
  int64_t first, count;
};

template <class Unit>
inline int64_t position(const Job<Unit>& job, const Chunk& c, int64_t row) {
  return c.x.position(row / job.g);
}
template <class Unit>
inline int64_t last_block(const Job<Unit>& job, const Chunk& c) {
  return position(job, c, c.first + c.count - 1) / job.a->block_size;
}

// Later rows see more keys: they come first.
template <class Unit>
inline Chunk chunk(const Job<Unit>& job, int64_t number) {
  const int64_t columns = job.cut.columns, g = job.g;
  const View &q = job.a->q_index, &k = job.a->k_index;
  const auto per = [&](const Sequence& x) { return (x.t * g + columns - 1) / columns; };
  const int64_t i = locate(job.a->borders, q.size[0], q.size[1], k.size[1], number, per);
  const Sequence x = sequence(job.a->borders, i, q.size[1], k.size[1]);
  const int64_t first = (per(x) - 1 - number) * columns;
  return {x, first, smaller(columns, x.t * g - first)};
}

// |scale| goes to the maxima, its sign to the queries; 0 makes every finite query 0 and no other finite.
inline void sign_row(float* x, int64_t n, float scale) {
  for (int64_t i = 0; i < n; ++i) x[i] = scale < 0 ? -x[i] : x[i] * 0.0f;
}
inline void sign_row(Pair* x, int64_t n, float scale) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(x);
  for (int64_t i = 0; i < 2 * n; ++i)
    halves[i] = scale < 0 ? halves[i] ^ 0x8000 : (halves[i] & 0x7f80) == 0x7f80 ? 0x7fc0 : 0;
}

template <class Unit>
inline void pack_queries(const Job<Unit>& job, const Chunk& c, int64_t from, int64_t n, Unit* to) {
  const View& q = job.a->q_index;
  for (int64_t r = from; r < from + n; ++r, to += job.lead) {
    const char* row = at(q, c.x.batch, c.x.q0 + r / job.g, r % job.g);
    pack_row(row, q.kind, q.stride[3], job.d, to);
    if (!(job.a->index_scale > 0)) sign_row(to, job.lead, job.a->index_scale);
  }
}

// Keys of a sequence as rows of units, and the step from one to the next.
template <class Unit>
inline const Unit* keys(const Job<Unit>& job, const Chunk& c, int64_t key, int64_t n, Unit* room, int64_t* step) {
  const View& k = job.a->k_index;
  if (job.in_place) {
    *step = k.stride[1] / UnitOf<Unit>::width;
    return reinterpret_cast<const Unit*>(at(k, c.x.batch, c.x.k0 + key, 0));
  }
  *step = job.lead;
  pack_rows(k, c.x.batch, c.x.k0 + key, 0, n, room);
  return room;
}

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
