// Which of the tables in this build this processor can run.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace openmsa {

#if defined(OPENMSA_HAS_avx512bf16)
namespace avx512bf16 { extern const Kernels table; }
#endif
#if defined(OPENMSA_HAS_avx512)
namespace avx512 { extern const Kernels table; }
#endif
#if defined(OPENMSA_HAS_avx2)
namespace avx2 { extern const Kernels table; }
#endif
namespace portable { extern const Kernels table; }

namespace {

#if defined(__x86_64__)
// Older compilers do not know the name f16c in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// These ask the operating system too: registers that it does not save do not count.
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

[[maybe_unused]] bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
#endif

struct Usable {
  const Kernels* tables[5] = {};

  Usable() {
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#if defined(OPENMSA_HAS_avx512bf16)
    if (has_avx512bf16()) tables[count++] = &avx512bf16::table;
#endif
#if defined(OPENMSA_HAS_avx512)
    if (has_avx512()) tables[count++] = &avx512::table;
#endif
#if defined(OPENMSA_HAS_avx2)
    if (has_avx2()) tables[count++] = &avx2::table;
#endif
    tables[count] = &portable::table;
  }
};

}  // namespace

const Kernels* const* kernels() {
  static const Usable usable;
  return usable.tables;
}

}  // namespace openmsa
