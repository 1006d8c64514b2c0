// What the native kernels offer: plain structs of pointers, sizes and strides, and one table of
// functions per instruction set. Nothing here knows of torch or Python.
//
// Letters as in openmsa/notation.py: b batch, t query tokens, s key tokens, h query heads, g KV heads
// (groups), d channels of a head, k blocks kept. Queries are the last t of the s keys of their sequence.
#pragma once
#include <cstddef>
#include <cstdint>

namespace openmsa {

enum class Kind : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

// A tensor of four axes [b, tokens, heads, channels]; strides count elements and may be anything, 0 and
// negative too. k_index [b, s, d_index] is passed with one head.
struct View {
  void* data;
  int64_t size[4];
  int64_t stride[4];
  Kind kind;
};

// Block numbers [b, G, t, k] in any order, -1 for an empty slot; G is 1, g or h. data null: no selection.
// Numbers may be anything: what is negative, in the future or past the end adds nothing, nor do repeats.
struct Blocks {
  const int32_t* data;
  int64_t size[4];
  int64_t stride[4];
};

// Packed sequences: borders of `count` sequences on the token axes of batch 0. count 0: every batch row is
// one sequence.
struct Borders {
  const int32_t* q;
  const int32_t* k;
  int64_t count;
};

struct SelectArguments {
  View q_index;  // [b, t, g, d_index]
  View k_index;  // [b, s, 1, d_index]
  int32_t* blocks;  // out: [b, g, t, top_k], contiguous
  int64_t block_size, top_k, local_blocks, sink_blocks;
  float index_scale;
  Borders borders;
  int threads;
};

struct AttendArguments {
  View q, k, v;  // [b, t, h, d], [b, s, g, d], [b, s, g, dv]
  Blocks blocks;  // data null: dense
  int64_t block_size;
  float scale;
  View out;    // out: [b, t, h, dv], kind of q
  float* lse;  // out: [b, t, h], contiguous
  Borders borders;
  int threads;
};

struct AttendBackwardArguments {
  View q, k, v;
  Blocks blocks;
  int64_t block_size;
  float scale;
  View out, dout;    // as the forward pass gave it; its gradient (any kind and strides)
  const float* lse;  // [b, t, h], contiguous
  View dq, dk, dv;   // out: shapes and kinds of q, k, v
  Borders borders;
  int threads;
};

struct IndexLossArguments {
  View q, k;              // main branch, the teacher: [b, t, h, d], [b, s, g, d]
  View q_index, k_index;  // student: [b, t, g, d_index], [b, s, 1, d_index]
  Blocks blocks;          // G is 1 or g; data null: the whole prefix
  int64_t block_size;
  float scale, index_scale;
  const float* weights;   // [b, t], contiguous, or null for ones
  const float* lse;       // main branch's lse on this support, [b, t, h] contiguous, or null
  double* loss;           // out: sum over tokens and groups of w * KL, not yet divided
  double* weight;         // out: sum over tokens of w, times g
  float* dq;              // out: [b, t, g, d_index] contiguous, gradient of `loss`; null: not wanted
  float* dk;              // out: [b, s, d_index] contiguous
  Borders borders;
  int threads;
};

// Every function returns false if it could not get its workspace, and then has written nothing of use.
struct Kernels {
  const char* name;
  bool (*select)(const SelectArguments&);
  bool (*attend)(const AttendArguments&);
  bool (*attend_backward)(const AttendBackwardArguments&);
  bool (*index_loss)(const IndexLossArguments&);
};

// The tables of this build that this machine can run, best first, ended by null.
const Kernels* const* kernels();

}  // namespace openmsa
