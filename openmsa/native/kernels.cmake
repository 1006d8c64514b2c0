# The targets, where there is a compiler. Sets OPENMSA_SETS, best first.
include(CheckCXXSourceCompiles)
find_package(nanobind CONFIG REQUIRED)
find_package(OpenMP COMPONENTS CXX)
find_package(Threads REQUIRED)

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

# Multiply-adds may fuse: one rounding less. Nothing else of IEEE is given up, since NaN and -inf
# carry meaning here; errno and floating-point traps do not.
set(kernel_flags $<IF:$<BOOL:${OPENMSA_SANITIZE}>,-O1,-O3> -ffp-contract=fast -fno-math-errno -fno-trapping-math
                 -fno-exceptions -fno-rtti -Wall -Wextra
                 $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)  # false in gcc 12's own headers
set(flags_avx2 -mavx2 -mfma -mf16c)
set(flags_avx512 ${flags_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq)
set(flags_avx512bf16 ${flags_avx512} -mavx512bf16)

# Each is compiled once before it counts: an old assembler refuses what a new compiler writes.
set(probe_avx2 "__m256 f(__m128i x) { __m256 y = _mm256_cvtph_ps(x); return _mm256_fmadd_ps(y, y, y); }")
set(probe_avx512 "__m512 f(__m512 x, __m512 y) { return _mm512_and_ps(x, _mm512_max_ps(x, y)); }")
set(probe_avx512bf16
    "__m512 f(__m512 x, __m512bh y) { return _mm512_dpbf16_ps(x, y, _mm512_cvtne2ps_pbh(x, x)); }")

if(OPENMSA_SANITIZE)
  add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=undefined
                      -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=address,undefined)
endif()

# On a universal macOS build CMAKE_SYSTEM_PROCESSOR is not the target: ask the compiler.
check_cxx_source_compiles("
#if !defined(__x86_64__)
#error
#endif
int main() { return 0; }" OPENMSA_X86)

set(sources select.cpp attend.cpp attend_backward.cpp index_loss.cpp)
list(TRANSFORM sources PREPEND ${OPENMSA_KERNELS}/)

foreach(set avx512bf16 avx512 avx2 portable)
  if(NOT set STREQUAL portable)
    string(REPLACE ";" " " CMAKE_REQUIRED_FLAGS "${flags_${set}}")
    check_cxx_source_compiles(
      "#include <immintrin.h>\n${probe_${set}}\nint main() { return 0; }" OPENMSA_FLAGS_${set})
    unset(CMAKE_REQUIRED_FLAGS)
    if(NOT OPENMSA_X86 OR NOT OPENMSA_FLAGS_${set})
      continue()
    endif()
  endif()
  add_library(kernels_${set} OBJECT ${sources} table.cpp)
  target_include_directories(kernels_${set} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
  target_compile_definitions(kernels_${set} PRIVATE OPENMSA_ISA=${set})
  target_compile_options(kernels_${set} PRIVATE ${kernel_flags} ${flags_${set}})
  list(APPEND OPENMSA_SETS ${set})
endforeach()

nanobind_add_module(_kernels NB_STATIC NOMINSIZE bindings.cpp dispatch.cpp threads.cpp)
foreach(set IN LISTS OPENMSA_SETS)
  target_sources(_kernels PRIVATE $<TARGET_OBJECTS:kernels_${set}>)
  target_compile_definitions(_kernels PRIVATE OPENMSA_HAS_${set})
endforeach()
target_link_libraries(_kernels PRIVATE Threads::Threads)
if(OpenMP_CXX_FOUND)
  # libgomp.so.1 by its soname: where torch has loaded its own, that one serves both.
  target_link_libraries(_kernels PRIVATE OpenMP::OpenMP_CXX)
endif()
install(TARGETS _kernels LIBRARY DESTINATION openmsa/native)
