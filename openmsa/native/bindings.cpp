// The Python module: unpacks tuples of whole numbers into the structs of kernels.h, releases the
// interpreter's lock and calls.
//
// A view arrives as (address, sizes, strides, kind); borders as (address, address, count) or None.
// Sizes that do not belong together are refused here, since a kernel would read past the end.
#include <nanobind/nanobind.h>

#include <stdexcept>

#include "kernels.h"

namespace nb = nanobind;

namespace openmsa {
namespace {

void require(bool holds, const char* rule) {
  if (!holds) throw nb::value_error(rule);
}

void four(nb::handle tuple, int64_t* numbers) {
  require(PyTuple_Check(tuple.ptr()) && PyTuple_GET_SIZE(tuple.ptr()) == 4,
          "a view has four sizes and four strides");
  for (int i = 0; i < 4; ++i) numbers[i] = nb::cast<int64_t>(nb::handle(PyTuple_GET_ITEM(tuple.ptr(), i)));
}

template <class T>
T* address(nb::handle number) {
  return reinterpret_cast<T*>(nb::cast<uintptr_t>(number));
}

View view(const nb::tuple& parts) {
  View made;
  made.data = address<void>(parts[0]);
  four(parts[1], made.size);
  four(parts[2], made.stride);
  const int kind = nb::cast<int>(parts[3]);
  require(kind >= 0 && kind <= 2, "kind is 0, 1 or 2");
  made.kind = static_cast<Kind>(kind);
  return made;
}

Blocks blocks(const nb::object& parts) {
  Blocks made{};
  if (parts.is_none()) return made;
  // An empty tensor has no address, but null would mean that there is no selection.
  static const int32_t nothing = -1;
  made.data = address<const int32_t>(parts[0]);
  if (!made.data) made.data = &nothing;
  four(parts[1], made.size);
  four(parts[2], made.stride);
  return made;
}

void ascend(const int32_t* borders, int64_t count, int64_t total, const char* rule) {
  bool holds = borders[0] == 0 && borders[count] == total;
  for (int64_t i = 0; i < count; ++i) holds = holds && borders[i] <= borders[i + 1];
  require(holds, rule);
}

Borders borders(const nb::object& parts, const View& q, const View& k) {
  Borders made{};
  require(q.size[0] == k.size[0], "queries and keys differ in batch");
  if (parts.is_none()) {
    require(q.size[1] <= k.size[1], "there are more query tokens than key tokens");
    return made;
  }
  made = {address<const int32_t>(parts[0]), address<const int32_t>(parts[1]),
          nb::cast<int64_t>(parts[2])};
  require(q.size[0] == 1 && made.count >= 1, "packed sequences are batch 1 and at least one");
  ascend(made.q, made.count, q.size[1], "cu_seqlens_q must ascend from 0 to the query tokens");
  ascend(made.k, made.count, k.size[1], "cu_seqlens_k must ascend from 0 to the key tokens");
  for (int64_t i = 0; i < made.count; ++i)
    require(made.q[i + 1] - made.q[i] <= made.k[i + 1] - made.k[i],
            "a sequence has more query tokens than key tokens");
  return made;
}

void alike(const View& a, const View& b, int axes, const char* rule) {
  for (int i = 0; i < axes; ++i) require(a.size[i] == b.size[i], rule);
}

void attention(const View& q, const View& k, const Blocks& chosen, int64_t block_size) {
  require(k.size[2] >= 1 && q.size[2] % k.size[2] == 0, "heads must be a multiple of KV heads");
  require(q.size[3] == k.size[3] && q.size[3] >= 1, "q and k differ in channels");
  require(q.kind == k.kind, "q and k differ in dtype");
  if (!chosen.data) return;
  const int64_t groups = chosen.size[1];
  require(chosen.size[0] == q.size[0] && chosen.size[2] == q.size[1], "blocks are of other queries");
  require(groups == 1 || groups == k.size[2] || groups == q.size[2], "blocks have 1, g or h groups");
  require(block_size >= 1, "block_size is at least 1");
}

template <class Arguments>
void call(bool (*kernel)(const Arguments&), const Arguments& arguments) {
  bool done;
  {
    nb::gil_scoped_release release;
    done = kernel(arguments);
  }
  if (!done) throw std::bad_alloc();
}

const Kernels& table(int set) {
  int count = 0;
  while (kernels()[count]) ++count;
  require(set >= 0 && set < count, "there is no such instruction set");
  return *kernels()[set];
}

nb::tuple instruction_sets() {
  nb::list names;
  for (auto* each = kernels(); *each; ++each) names.append((*each)->name);
  return nb::tuple(names);
}

void select_blocks(int set, int threads, nb::tuple q_index, nb::tuple k_index, uintptr_t out,
                   int64_t block_size, int64_t top_k, int64_t local_blocks, int64_t sink_blocks,
                   float index_scale, nb::object cu_seqlens) {
  SelectArguments a{};
  a.q_index = view(q_index), a.k_index = view(k_index);
  a.blocks = reinterpret_cast<int32_t*>(out);
  require(a.k_index.size[2] == 1 && a.q_index.size[3] == a.k_index.size[3], "q_index and k_index differ");
  require(a.q_index.kind == a.k_index.kind, "q_index and k_index differ in dtype");
  require(block_size >= 1 && top_k >= 1 && local_blocks >= 0 && sink_blocks >= 0 &&
              local_blocks + sink_blocks <= top_k,
          "forced blocks must fit into top_k");
  a.block_size = block_size, a.top_k = top_k;
  a.local_blocks = local_blocks, a.sink_blocks = sink_blocks;
  a.index_scale = index_scale;
  a.borders = borders(cu_seqlens, a.q_index, a.k_index);
  a.threads = threads;
  call(table(set).select, a);
}

void attend(int set, int threads, nb::tuple q, nb::tuple k, nb::tuple v, nb::object chosen,
            int64_t block_size, float scale, nb::tuple out, uintptr_t lse, nb::object cu_seqlens) {
  AttendArguments a{};
  a.q = view(q), a.k = view(k), a.v = view(v), a.out = view(out);
  a.blocks = blocks(chosen), a.block_size = block_size, a.scale = scale;
  a.lse = reinterpret_cast<float*>(lse);
  attention(a.q, a.k, a.blocks, block_size);
  alike(a.k, a.v, 3, "k and v differ");
  alike(a.q, a.out, 3, "q and out differ");
  require(a.out.size[3] == a.v.size[3], "v and out differ in channels");
  require(a.v.kind == a.q.kind && a.out.kind == a.q.kind, "q, v and out differ in dtype");
  a.borders = borders(cu_seqlens, a.q, a.k);
  a.threads = threads;
  call(table(set).attend, a);
}

void attend_backward(int set, int threads, nb::tuple q, nb::tuple k, nb::tuple v, nb::object chosen,
                     int64_t block_size, float scale, nb::tuple out, nb::tuple dout, uintptr_t lse,
                     nb::tuple dq, nb::tuple dk, nb::tuple dv, nb::object cu_seqlens) {
  AttendBackwardArguments a{};
  a.q = view(q), a.k = view(k), a.v = view(v), a.out = view(out), a.dout = view(dout);
  a.dq = view(dq), a.dk = view(dk), a.dv = view(dv);
  a.blocks = blocks(chosen), a.block_size = block_size, a.scale = scale;
  a.lse = reinterpret_cast<const float*>(lse);
  attention(a.q, a.k, a.blocks, block_size);
  alike(a.k, a.v, 3, "k and v differ");
  alike(a.q, a.out, 3, "q and out differ");
  require(a.out.size[3] == a.v.size[3] && a.v.kind == a.q.kind, "v and out differ");
  alike(a.out, a.dout, 4, "out and dout differ");
  alike(a.q, a.dq, 4, "q and dq differ");
  alike(a.k, a.dk, 4, "k and dk differ");
  alike(a.v, a.dv, 4, "v and dv differ");
  a.borders = borders(cu_seqlens, a.q, a.k);
  a.threads = threads;
  call(table(set).attend_backward, a);
}

// Returns (loss, weight): the sums that the caller divides.
nb::tuple index_loss(int set, int threads, nb::tuple q, nb::tuple k, nb::tuple q_index, nb::tuple k_index,
                     nb::object chosen, int64_t block_size, float scale, float index_scale,
                     uintptr_t weights, uintptr_t lse, uintptr_t dq, uintptr_t dk, nb::object cu_seqlens) {
  IndexLossArguments a{};
  double loss = 0, weight = 0;
  a.q = view(q), a.k = view(k), a.q_index = view(q_index), a.k_index = view(k_index);
  a.blocks = blocks(chosen), a.block_size = block_size;
  a.scale = scale, a.index_scale = index_scale;
  a.weights = reinterpret_cast<const float*>(weights), a.lse = reinterpret_cast<const float*>(lse);
  a.loss = &loss, a.weight = &weight;
  a.dq = reinterpret_cast<float*>(dq), a.dk = reinterpret_cast<float*>(dk);
  attention(a.q, a.k, a.blocks, block_size);
  require(!a.blocks.data || a.blocks.size[1] == 1 || a.blocks.size[1] == a.k.size[2],
          "blocks have 1 or g groups");
  alike(a.q, a.q_index, 2, "q and q_index differ");
  alike(a.k, a.k_index, 2, "k and k_index differ");
  require(a.q_index.size[2] == a.k.size[2] && a.k_index.size[2] == 1, "one index query per KV head");
  require(a.q_index.size[3] == a.k_index.size[3], "q_index and k_index differ in channels");
  require(a.q_index.kind == a.k_index.kind, "q_index and k_index differ in dtype");
  require(!a.dq == !a.dk, "both gradients or none");
  a.borders = borders(cu_seqlens, a.q, a.k);
  a.threads = threads;
  call(table(set).index_loss, a);
  return nb::make_tuple(loss, weight);
}

}  // namespace
}  // namespace openmsa

NB_MODULE(_kernels, m) {
  m.def("instruction_sets", &openmsa::instruction_sets);
  m.def("select_blocks", &openmsa::select_blocks, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
  m.def("attend", &openmsa::attend, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
  m.def("attend_backward", &openmsa::attend_backward, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg().none());
  m.def("index_loss", &openmsa::index_loss, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none());
}
