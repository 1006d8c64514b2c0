// select: which blocks of keys each query token and group reads.
//
//   best[n, r] = max over the keys of block n that row r sees of q[r] . k[key]
//   row r keeps its forced blocks, then the others by (best descending, n ascending)
//
// Rows r = token * g + group of one sequence are the columns of a product whose rows are keys, so a block's
// maximum runs down the sums of a tile: no score leaves the registers. NaN loses every comparison.
#include "keep_best.h"
#include "product.h"
#include "select_plan.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

// Takes sums [keys][rows] into the maxima of their blocks.
struct Fold {
  float* best;           // of the first key's block and the first row
  int64_t step;
  const int32_t* block;  // of each key, counted from the first's
  const float* limit;    // the last key that each row sees, counted alike; null: all see all
  template <int R, int N>
  inline __attribute__((always_inline)) void operator()(V (&sums)[R][N], int64_t key, int64_t column) const {
    if (limit)
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < N; ++j)
          sums[i][j] = where_le(all(float(key + i)), load(limit + column + j * W), sums[i][j], all(-INF));
    const bool together = block[key] == block[key + R - 1];
    float* to = best + block[key] * step + column;
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      V most = load(to + j * W);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        if (!together && i > 0 && block[key + i] != block[key + i - 1]) {
          store(best + block[key + i - 1] * step + column + j * W, most);
          most = load(best + block[key + i] * step + column + j * W);
        }
        most = max(sums[i][j], most);
      }
      store(best + block[key + R - 1] * step + column + j * W, most);
    }
  }
};

template <class Unit>
inline void find_limits(const Job<Unit>& job, const Chunk& c, int64_t column, int64_t n, int64_t key, int64_t count,
                        float* limit) {
  int64_t token = (c.first + column) / job.g, group = (c.first + column) % job.g;
  for (int64_t i = 0; i < n; ++i) {
    limit[i] = float(smaller(c.x.position(token) - key, count));
    if (++group == job.g) group = 0, ++token;
  }
}

// Maxima of blocks from .. to - 1 for many rows.
template <class Unit>
inline void score_many(const Job<Unit>& job, const Chunk& c, int64_t from, int64_t to, float* best, char* memory) {
  const int64_t block_size = job.a->block_size, columns = job.cut.columns, width = padded(smaller(PANEL, c.count));
  const int64_t unit_count = units<Unit>(job.d), panel = job.lead * width;
  Unit* room = take<Unit>(memory, larger(job.take, width) * job.lead);
  Unit* across = take<Unit>(memory, padded(c.count) * job.lead);
  int32_t* block = take<int32_t>(memory, job.take);
  alignas(64) float limit[PANEL];
  for (int64_t i = 0; i < c.count; i += width) {
    const int64_t n = smaller(width, c.count - i);
    pack_queries(job, c, c.first + i, n, room);
    turn(room, n, job.lead, unit_count, across + i / width * panel);
  }
  for (int64_t i = 0; i < job.take; ++i) block[i] = int32_t(i / block_size);

  const int64_t end = smaller(to * block_size, position(job, c, c.first + c.count - 1) + 1);
  for (int64_t key = from * block_size, n; key < end; key += n) {
    const int64_t j = key / block_size, left = job.take < block_size ? (j + 1) * block_size - key : job.take;
    n = smaller(smaller(job.take, left), end - key);
    const int64_t fresh = (key + block_size - 1) / block_size, stop = (key + n - 1) / block_size + 1;
    for (int64_t i = fresh * columns; i < stop * columns; i += W) store(best + i, all(-INF));
    int64_t step;
    const Unit* rows = keys(job, c, key, n, room, &step);
    for (int64_t i = 0; i < c.count; i += width) {
      const int64_t own = smaller(width, c.count - i), last = position(job, c, c.first + i + own - 1);
      if (last < key) continue;
      const bool all_seen = position(job, c, c.first + i) >= key + n - 1;
      if (!all_seen) find_limits(job, c, i, padded(own), key, n, limit);
      product<Unit>({rows, step, smaller(n, last + 1 - key), across + i / width * panel, padded(own), padded(own),
                     unit_count},
                    FromZero{}, Fold{best + j * columns + i, columns, block, all_seen ? nullptr : limit});
    }
  }
}

// K keys with R rows: lane i * R + r is the score of key i with row r. Of fewer keys the last stands for the rest.
// Keys may be units, or halves that are widened on the way.
constexpr int R = 4, K = W / R;
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
OPENMSA_INLINE V lanes(const Bf16* x) { return load_bf16(&x->bits); }
OPENMSA_INLINE V lanes(const F16* x) { return load_f16(&x->bits); }
template <class Unit, class Key>
OPENMSA_INLINE V score_tile(const Unit* rows, int64_t lead, const Key* keys, int64_t step, int64_t n) {
  V sums[W];
  for (int i = 0; i < W; ++i) sums[i] = zero();
  const Key* key[K];
  for (int i = 0; i < K; ++i) key[i] = keys + smaller(i, n - 1) * step;
  const Key* ahead = step == lead ? keys + 8 * K * step : keys;  // keys to come, in the order of their addresses
  for (int64_t u = 0; u < lead; u += W) {
    decltype(lanes(rows)) left[R];
    for (int r = 0; r < R; ++r) left[r] = lanes(rows + r * lead + u);
    for (int i = 0; i < K; ++i) {
      __builtin_prefetch(ahead + u * K + i * W);
      const auto right = lanes(key[i] + u);
      for (int r = 0; r < R; ++r) sums[i * R + r] = dot(sums[i * R + r], left[r], right);
    }
  }
  return sums_of(sums);
}

template <class Key, class Unit>
inline const Key* few_keys(const Job<Unit>& job, const Chunk& c, int64_t key, int64_t n, Unit* room, int64_t* step) {
  if constexpr (sizeof(Key) == sizeof(Unit)) {
    return keys(job, c, key, n, room, step);
  } else {
    *step = job.a->k_index.stride[1];
    return reinterpret_cast<const Key*>(at(job.a->k_index, c.x.batch, c.x.k0 + key, 0));
  }
}

// Maxima of the same blocks for few rows: each key is read once, as it lies.
template <class Key, class Unit>
inline void score_few(const Job<Unit>& job, const Chunk& c, int64_t from, int64_t to, float* best, char* memory) {
  const int64_t block_size = job.a->block_size, last = position(job, c, c.first + c.count - 1);
  const int64_t groups = (c.count + R - 1) / R;
  Unit* room = take<Unit>(memory, job.take * job.lead);
  Unit* queries = take<Unit>(memory, FEW * job.lead);
  std::memset(static_cast<void*>(queries), 0, size_t(FEW * job.lead) * 4);
  pack_queries(job, c, c.first, c.count, queries);
  alignas(64) float number[W], limit[FEW * K], most[FEW * K];  // of a lane: its key, the last it sees, the maximum
  int64_t seen[FEW * K];
  for (int64_t i = 0; i < W; ++i) number[i] = float(i / R);
  for (int64_t i = 0; i < FEW * K; ++i) seen[i] = position(job, c, c.first + smaller(i / W * R + i % R, c.count - 1));
  for (int64_t j = from; j < to; ++j) {
    for (int64_t i = 0; i < FEW * K; i += W) store(most + i, all(-INF));
    const int64_t end = smaller((j + 1) * block_size, last + 1);
    for (int64_t key = j * block_size, n; key < end; key += n) {
      n = smaller(job.take, end - key);
      for (int64_t i = 0; i < groups * W; ++i) limit[i] = float(smaller(seen[i] - key, n - 1));
      int64_t step;
      const Key* rows = few_keys<Key>(job, c, key, n, room, &step);
      for (int64_t i = 0; i < n; i += K)
        for (int64_t group = 0; group < groups; ++group) {
          const V score = score_tile(queries + group * R * job.lead, job.lead, rows + i * step, step, n - i);
          const V seen = where_le(add(all(float(i)), load(number)), load(limit + group * W), score, all(-INF));
          store(most + group * W, max(seen, load(most + group * W)));
        }
    }
    for (int64_t row = 0; row < c.count; ++row) {
      float* to = best + j * job.cut.columns + row;
      *to = -INF;
      for (int64_t i = row / R * W + row % R; i < (row / R + 1) * W; i += R) *to = most[i] > *to ? most[i] : *to;
    }
  }
}

// The answers of a chunk from its maxima, which it turns, 16 rows and 16 blocks at a time.
template <class Unit>
inline void choose_all(const Job<Unit>& job, const Chunk& c, float* best, char* memory) {
  const SelectArguments& a = *job.a;
  const int64_t columns = job.cut.columns, n = last_block(job, c) + 1;
  float* scores = take<float>(memory, padded(n) + 128);
  alignas(64) uint32_t tile[16 * 16];
  for (int64_t i = n * columns; i < padded(n) * columns; i += W) store(best + i, all(-INF));
  for (int64_t column = 0; column < c.count; column += 16) {
    for (int64_t j = 0; j < n; j += 16) {
      float* corner = best + j * columns + column;
      transpose16(reinterpret_cast<const uint32_t*>(corner), columns, tile, 16);
      for (int64_t i = 0; i < 16; ++i) std::memcpy(corner + i * columns, tile + i * 16, 64);
    }
    for (int64_t i = column; i < smaller(column + 16, c.count); ++i) {
      const int64_t row = c.first + i, token = row / job.g, own = c.x.position(token) / a.block_size;
      const float* from = best + (i - column) * columns + column;
      for (int64_t j = 0; j <= own; j += 16)
        for (int64_t lane = 0; lane < 16; lane += W)
          store(scores + j + lane, mul(load(from + j * columns + lane), all(job.scale)));
      const int64_t place = (c.x.batch * job.g + row % job.g) * a.q_index.size[1] + c.x.q0 + token;
      choose(a, scores, own, a.blocks + place * a.top_k);
    }
  }
}

template <class Unit>
inline void score(const Job<Unit>& job, const Chunk& c, int64_t from, int64_t to, float* best, char* memory) {
  if (c.x.t * job.g > FEW) return score_many(job, c, from, to, best, memory);
  if constexpr (UnitOf<Unit>::width == 1) {
    const Kind kind = job.a->k_index.kind;
    if (job.dense && kind == Kind::bf16) return score_few<Bf16>(job, c, from, to, best, memory);
    if (job.dense && kind == Kind::f16) return score_few<F16>(job, c, from, to, best, memory);
  }
  score_few<Unit>(job, c, from, to, best, memory);
}
template <class Unit>
void whole_chunk(void* context, int64_t task, int worker) {
  const Job<Unit>& job = *static_cast<const Job<Unit>*>(context);
  const Chunk c = chunk(job, task);
  char* memory = job.scratch->of(worker);
  float* best = take<float>(memory, job.cut.best_size());
  score(job, c, 0, last_block(job, c) + 1, best, memory);
  choose_all(job, c, best, memory);
}
template <class Unit>
void one_range(void* context, int64_t task, int worker) {
  const Job<Unit>& job = *static_cast<const Job<Unit>*>(context);
  const int64_t own = task / job.cut.ranges, range = task % job.cut.ranges;
  const Chunk c = chunk(job, job.wave + own);
  const int64_t n = last_block(job, c) + 1, each = (n + job.cut.ranges - 1) / job.cut.ranges;
  float* best = reinterpret_cast<float*>(job.shared) + own * job.cut.best_size();
  score(job, c, range * each, smaller(n, (range + 1) * each), best, job.scratch->of(worker));
}
template <class Unit>
void choose_chunk(void* context, int64_t task, int worker) {
  const Job<Unit>& job = *static_cast<const Job<Unit>*>(context);
  float* best = reinterpret_cast<float*>(job.shared) + task * job.cut.best_size();
  choose_all(job, chunk(job, job.wave + task), best, job.scratch->of(worker));
}

template <class Unit>
inline bool run(const SelectArguments& a) {
  Job<Unit> job{};
  const View& k = a.k_index;
  constexpr Kind kind = UnitOf<Unit>::width == 2 ? Kind::bf16 : Kind::f32;
  int threads;
  job.a = &a;
  job.d = k.size[3], job.g = a.q_index.size[2], job.lead = lead<Unit>(job.d);
  job.cut = cut_call(a, units<Unit>(job.d), &threads);
  if (job.cut.chunks == 0) return true;
  const Cut& cut = job.cut;
  job.scale = a.index_scale < 0 ? -a.index_scale : a.index_scale > 0 ? a.index_scale : 1.0f;
  const int64_t parts = (a.block_size + PIECE - 1) / PIECE;
  job.take = parts > 1 ? (a.block_size + parts - 1) / parts : PIECE / a.block_size * a.block_size;
  job.dense = k.stride[3] == 1 && job.d % (PAD * UnitOf<Unit>::width) == 0;
  job.in_place = job.dense && k.kind == kind && k.stride[0] % UnitOf<Unit>::width == 0 &&
                 k.stride[1] % UnitOf<Unit>::width == 0 && reinterpret_cast<uintptr_t>(k.data) % 4 == 0;

  const int64_t best_bytes = cut.best_size() * 4;
  const int64_t own = (larger(job.take, PANEL) + larger(cut.columns, FEW)) * job.lead * 4 + job.take * 4 +
                      (cut.blocks + 128) * 4 + (cut.ranges == 1 ? best_bytes : 0);
  const int64_t at_once = smaller(cut.chunks, larger(1, CALL_BYTES / best_bytes));  // chunks of a wave
  threads = int(smaller(threads, cut.ranges == 1 ? at_once : cut.ranges * at_once));
  Scratch scratch(threads, own);
  Scratch shared(1, cut.ranges == 1 ? 0 : at_once * best_bytes);
  if (!scratch.memory || !shared.memory) return false;
  job.scratch = &scratch, job.shared = shared.memory;
  if (cut.ranges == 1) {
    run_tasks(threads, cut.chunks, whole_chunk<Unit>, &job);
    return true;
  }
  for (; job.wave < cut.chunks; job.wave += at_once) {
    const int64_t chunks = smaller(at_once, cut.chunks - job.wave);
    run_tasks(threads, chunks * cut.ranges, one_range<Unit>, &job);
    run_tasks(threads, chunks, choose_chunk<Unit>, &job);
  }
  return true;
}

}  // namespace

bool select(const SelectArguments& given) {
  SelectArguments a = given;  // the same answer from numbers that cannot overflow
  a.block_size = smaller(a.block_size, larger(1, a.k_index.size[1]));
  a.local_blocks = smaller(a.local_blocks, a.top_k);
  a.sink_blocks = smaller(a.sink_blocks, a.top_k - a.local_blocks);
#if defined(OPENMSA_PAIRS)
  if (a.q_index.kind == Kind::bf16 && a.k_index.kind == Kind::bf16) return run<Pair>(a);
#endif
  return run<float>(a);
}

}  // namespace OPENMSA_ISA
}  // namespace openmsa
