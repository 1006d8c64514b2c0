// Runs the four kernels of every instruction set of this build on the same invented inputs, and prints
// a line of numbers for every result: "set kernel kind value value ...". Every run, on any machine,
// prints the same lines up to rounding.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

using namespace openmsa;

namespace {

struct Random {  // numbers that every machine agrees on
  uint64_t state;
  float next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(state >> 32)) / 2147483648.0f;
  }
};

uint16_t bf16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint16_t f16_of(float x) {  // for |x| in [2^-14, 2), enough here
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, exponent = (bits >> 23) & 0xff;
  if (exponent < 113) return static_cast<uint16_t>(sign);
  const uint32_t rest = ((exponent - 112) << 10 | (bits & 0x7fffff) >> 13);
  return static_cast<uint16_t>(sign | rest);
}

float value_of(const void* data, int64_t i, Kind kind) {
  if (kind == Kind::f32) return static_cast<const float*>(data)[i];
  const uint16_t half = static_cast<const uint16_t*>(data)[i];
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  if (kind == Kind::bf16) {
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  x = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24);
  return half & 0x8000 ? -x : x;
}

struct Tensor {
  std::vector<char> bytes;
  View view;
  Tensor(int64_t b, int64_t n, int64_t h, int64_t d, Kind kind, uint64_t seed = 0) {
    const int64_t count = b * n * h * d, width = kind == Kind::f32 ? 4 : 2;
    bytes.assign(static_cast<size_t>(count * width), static_cast<char>(0xff));
    view = {bytes.data(), {b, n, h, d}, {n * h * d, h * d, d, 1}, kind};
    Random random{seed};
    for (int64_t i = 0; seed && i < count; ++i) {
      const float x = random.next();
      const uint16_t half = kind == Kind::bf16 ? bf16_of(x) : f16_of(x);
      if (kind == Kind::f32) std::memcpy(&bytes[i * 4], &x, 4);
      else std::memcpy(&bytes[i * 2], &half, 2);
    }
  }
  int64_t count() const { return view.size[0] * view.size[1] * view.size[2] * view.size[3]; }
  void print(const char* set, const char* what, const char* kind) const {
    std::printf("%s %s %s", set, what, kind);
    for (int64_t i = 0; i < count(); ++i) std::printf(" %.9g", value_of(view.data, i, view.kind));
    std::printf("\n");
  }
};

void check(bool done) {
  if (!done) {
    std::fprintf(stderr, "a kernel found no memory\n");
    std::exit(1);
  }
}

// 70 keys in two packed sequences, the queries the last of each; odd head dims; blocks of 16, 3 kept.
void run(const Kernels& kernels, Kind kind, const char* name) {
  const int64_t t = 33, s = 83, h = 4, g = 2, d = 20, dv = 36, di = 24, k = 3;
  const int32_t q_borders[] = {0, 13, 33}, k_borders[] = {0, 30, 83};
  const Borders borders{q_borders, k_borders, 2};
  const float scale = 1 / std::sqrt(float(d)), index_scale = 1 / std::sqrt(float(di));
  Tensor q(1, t, h, d, kind, 1), key(1, s, g, d, kind, 2), v(1, s, g, dv, kind, 3);
  Tensor q_index(1, t, g, di, kind, 4), k_index(1, s, 1, di, kind, 5);
  std::vector<int32_t> numbers(g * t * k);
  check(kernels.select({q_index.view, k_index.view, numbers.data(), 16, k, 1, 0, index_scale, borders, 2}));
  std::printf("%s select %s", kernels.name, name);
  for (const int32_t number : numbers) std::printf(" %d", number);
  std::printf("\n");
  for (const bool dense : {false, true}) {
    const Blocks chosen{dense ? nullptr : numbers.data(), {1, g, t, k}, {g * t * k, t * k, k, 1}};
    const char* kinds[] = {"sparse", "dense"};
    std::printf("%s support %s %d\n", kernels.name, kinds[dense], dense);
    Tensor out(1, t, h, dv, kind), dq(1, t, h, d, kind), dk(1, s, g, d, kind), dv_(1, s, g, dv, kind);
    Tensor dout(1, t, h, dv, kind, 6), lse(1, t, h, 1, Kind::f32);
    float* sums = static_cast<float*>(lse.view.data);
    check(kernels.attend({q.view, key.view, v.view, chosen, 16, scale, out.view, sums, borders, 2}));
    check(kernels.attend_backward({q.view, key.view, v.view, chosen, 16, scale, out.view, dout.view, sums,
                                   dq.view, dk.view, dv_.view, borders, 2}));
    double loss, weight;
    Tensor dqi(1, t, g, di, Kind::f32), dki(1, s, 1, di, Kind::f32);
    check(kernels.index_loss({q.view, key.view, q_index.view, k_index.view, chosen, 16, scale, index_scale,
                              nullptr, sums, &loss, &weight, static_cast<float*>(dqi.view.data),
                              static_cast<float*>(dki.view.data), borders, 2}));
    out.print(kernels.name, "out", name);
    lse.print(kernels.name, "lse", name);
    dq.print(kernels.name, "dq", name);
    dk.print(kernels.name, "dk", name);
    dv_.print(kernels.name, "dv", name);
    dqi.print(kernels.name, "dq_index", name);
    dki.print(kernels.name, "dk_index", name);
    std::printf("%s loss %s %.9g %.9g\n", kernels.name, name, loss, weight);
  }
}

}  // namespace

int main() {
  for (const Kernels* const* table = kernels(); *table; ++table) {
    run(**table, Kind::f32, "f32");
    run(**table, Kind::f16, "f16");
    run(**table, Kind::bf16, "bf16");
  }
}
