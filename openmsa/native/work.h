// How a call is cut into tasks: sequences, chunks of query tokens, and who reads which block.
#pragma once
#include "panels.h"
#include "threads.h"

namespace openmsa {
namespace OPENMSA_ISA {
namespace {

// Query tokens q0 .. q0 + t - 1 and key tokens k0 .. k0 + s - 1 of one batch row; the query with number i
// stands at s - t + i.
struct Sequence {
  int64_t batch, q0, t, k0, s;
  int64_t position(int64_t i) const { return s - t + i; }
};

inline int64_t sequences(const Borders& borders, int64_t batches) { return borders.count ? borders.count : batches; }
inline Sequence sequence(const Borders& borders, int64_t i, int64_t t, int64_t s) {
  if (!borders.count) return {i, 0, t, 0, s};
  return {0, borders.q[i], borders.q[i + 1] - borders.q[i], borders.k[i], borders.k[i + 1] - borders.k[i]};
}
inline int64_t longest(const Borders& borders, const int32_t* ends, int64_t otherwise) {
  if (!borders.count) return otherwise;
  int64_t most = 0;
  for (int64_t i = 0; i < borders.count; ++i) most = larger(most, ends[i + 1] - ends[i]);
  return most;
}

// One task in a list of equal chunks over all sequences: number -> (sequence, rest).
// `per(sequence)` says how many tasks a sequence gives.
template <class Per>
inline int64_t locate(const Borders& borders, int64_t batches, int64_t t, int64_t s, int64_t& task, Per per) {
  const int64_t count = sequences(borders, batches);
  if (!borders.count) {  // all alike
    const int64_t each = per(sequence(borders, 0, t, s));
    const int64_t i = task / each;
    task -= i * each;
    return i;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t own = per(sequence(borders, i, t, s));
    if (task < own) return i;
    task -= own;
  }
  return count;
}
template <class Per>
inline int64_t count_tasks(const Borders& borders, int64_t batches, int64_t t, int64_t s, Per per) {
  if (!borders.count) return batches ? batches * per(sequence(borders, 0, t, s)) : 0;
  int64_t total = 0;
  for (int64_t i = 0; i < borders.count; ++i) total += per(sequence(borders, i, t, s));
  return total;
}

// Query heads that share both their keys and their selection. Each KV head has `per_kv` of them.
struct Groups {
  int64_t count, heads, per_kv;
  Groups(const Blocks& blocks, int64_t h, int64_t g)
      : count(blocks.data && blocks.size[1] > g ? blocks.size[1] : g), heads(h / count), per_kv(count / g) {}
  int64_t kv_head(int64_t group) const { return group / per_kv; }
  // Whether every token goes by itself, with its own keys packed from where they lie: blocks so short have too
  // little to share.
  bool apart(int64_t block, int64_t s) const { return block < PAD && block <= heads && s < int64_t(1) << 31; }
};

// Who reads which block, the other way round: for every block the query tokens that selected it, ascending,
// each once. Only blocks that the token sees at least one key of. tokens[first[j] .. first[j + 1]) for block j.
struct Readers {
  int64_t* first;   // [blocks + 1]
  int32_t* tokens;  // room for tokens * k
  int64_t* seen;    // [blocks], scratch
};
// Tokens from .. to - 1 of sequence x; n = number of blocks that cover position(to - 1) at least.
inline void find_readers(const Blocks& blocks, int64_t group, const Sequence& x, int64_t from, int64_t to,
                         int64_t block_size, int64_t n, const Readers& out) {
  const int64_t G = blocks.size[1], k = blocks.size[3];
  const int32_t* data = blocks.data + x.batch * blocks.stride[0] + (G == 1 ? 0 : group) * blocks.stride[1];
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 0) {
      for (int64_t j = 0; j <= n; ++j) out.first[j] = 0;
    } else {  // counts, one place further -> where each block's tokens begin
      int64_t total = 0;
      for (int64_t j = 0; j < n; ++j) {
        const int64_t own = out.first[j];
        out.first[j] = total;
        total += own;
      }
      out.first[n] = total;
    }
    for (int64_t j = 0; j < n; ++j) out.seen[j] = -1;
    for (int64_t i = from; i < to; ++i) {
      const int32_t* slots = data + (x.q0 + i) * blocks.stride[2];
      const int64_t visible = x.position(i) / block_size;  // the last block it sees a key of
      for (int64_t slot = 0; slot < k; ++slot) {
        const int64_t j = slots[slot * blocks.stride[3]];
        if (j < 0 || j > visible || j >= n || out.seen[j] == i) continue;
        out.seen[j] = i;
        if (pass == 0)
          ++out.first[j];
        else
          out.tokens[out.first[j]++] = int32_t(i);
      }
    }
  }
  for (int64_t j = n; j > 0; --j) out.first[j] = out.first[j - 1];  // filling moved every start to its end
  out.first[0] = 0;
}

// The keys that one token reads, ascending, each once.
struct Choice {
  int64_t count = 0;
  int32_t* keys;
  Choice(int64_t room, char*& memory);

  void find(const Blocks& blocks, int64_t group, const Sequence& x, int64_t token, int64_t block) {
    const int64_t position = x.position(token), last = position / block;
    const int32_t* slots = blocks.data + x.batch * blocks.stride[0] +
                           (blocks.size[1] == 1 ? 0 : group) * blocks.stride[1] + (x.q0 + token) * blocks.stride[2];
    bool ascend = true;
    count = 0;
    for (int64_t slot = 0; slot < blocks.size[3]; ++slot) {
      const int32_t j = slots[slot * blocks.stride[3]];
      if (j < 0 || j > last) continue;
      if (count && keys[count - 1] >= j) ascend = false;
      keys[count++] = j;
    }
    if (!ascend) sort();
    const int64_t found = count;
    for (int64_t i = found - 1; i >= 0; --i)  // from the end: block numbers make room for themselves
      for (int64_t place = block - 1, first = keys[i] * block; place >= 0; --place)
        keys[i * block + place] = int32_t(first + place);
    for (count = found * block; count && keys[count - 1] > position;) --count;
  }
  // How many of them come before a key.
  int64_t before(int64_t key) const {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (keys[middle] < key)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

 private:
  void sort() {
    for (int64_t gap = count / 2; gap > 0; gap /= 2)
      for (int64_t i = gap; i < count; ++i) {
        const int32_t one = keys[i];
        int64_t at = i;
        for (; at >= gap && keys[at - gap] > one; at -= gap) keys[at] = keys[at - gap];
        keys[at] = one;
      }
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i)
      if (!kept || keys[kept - 1] != keys[i]) keys[kept++] = keys[i];
    count = kept;
  }
};

// Scratch memory of one call: `bytes` for each worker, 64-byte aligned pieces taken in order.
struct Scratch {
  char* memory;
  int64_t bytes;
  Scratch(int workers, int64_t bytes_each) : bytes((bytes_each + 4096 + 63) / 64 * 64) {
    memory = static_cast<char*>(allocate(bytes * workers));
  }
  ~Scratch() { release(memory); }
  Scratch(const Scratch&) = delete;
  char* of(int worker) const { return memory + worker * bytes; }
};
template <class T>
inline T* take(char*& memory, int64_t count) {
  T* piece = reinterpret_cast<T*>(memory);
  memory += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  return piece;
}
inline Choice::Choice(int64_t room, char*& memory) : keys(take<int32_t>(memory, room)) {}

}  // namespace
}  // namespace OPENMSA_ISA
}  // namespace openmsa
