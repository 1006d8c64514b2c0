/* What two dozen registers can do here: independent vdpbf16ps, then fma, nothing else in the loop.
 * The roof above torch's matmul, and above every kernel.  Linux, AVX-512-BF16:
 *     gcc -O2 -mavx512f -mavx512bf16 -fopenmp benchmarks/peak.c -o /tmp/peak && /tmp/peak
 */
#include <immintrin.h>
#include <omp.h>
#include <stdio.h>

#define ROUNDS 20000000L
#define EACH(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11) do(12) do(13) \
  do(14) do(15) do(16) do(17) do(18) do(19) do(20) do(21) do(22) do(23)
#define START(i) __m512 sum##i = _mm512_set1_ps(i);
#define ADD(i) total = _mm512_add_ps(total, sum##i);
#define BF16(i) __asm__ volatile("vdpbf16ps %1, %2, %0" : "+v"(sum##i) : "v"(x), "v"(y));
#define FP32(i) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(sum##i) : "v"(x), "v"(y));

#define LOOP(name, STEP)                                              \
  __attribute__((noinline)) static float name(int bits) {             \
    const __m512 x = _mm512_castsi512_ps(_mm512_set1_epi32(bits));    \
    const __m512 y = _mm512_castsi512_ps(_mm512_set1_epi32(bits));    \
    EACH(START)                                                       \
    for (long round = 0; round < ROUNDS; ++round) { EACH(STEP) }      \
    __m512 total = _mm512_setzero_ps();                               \
    EACH(ADD)                                                         \
    return _mm512_cvtss_f32(total);                                   \
  }
LOOP(bf16, BF16)
LOOP(fp32, FP32)

static double rate(float (*loop)(int), double flops, int threads) {
  const double start = omp_get_wtime();
  float kept = 0;
#pragma omp parallel num_threads(threads) reduction(+ : kept)
  kept += loop(0x3f003f00);
  const double seconds = omp_get_wtime() - start;
  return kept == 1 ? 0 : threads * 24.0 * ROUNDS * flops / seconds / 1e9;
}

int main(void) {
  const int threads = omp_get_max_threads();
  for (int repeat = 0; repeat < 3; ++repeat)
    printf("%d threads: bf16 %.0f GFLOP/s, fp32 %.0f GFLOP/s\n", threads, rate(bf16, 64, threads),
           rate(fp32, 32, threads));
}
