// Vectors of the instruction set that a *_isa.cpp file is compiled for (CFL_ISA_AMX,
// CFL_ISA_AVX512, CFL_ISA_AVX2, or none of them: SSE2 on x86-64, NEON on aarch64). Only those files
// include this.
//
// No C++ standard library here or there: its inline functions would be compiled with the file's
// instructions, and the linker could then pick them for code that runs on older machines. For the
// same reason everything lives in an unnamed namespace.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(CFL_ISA_AVX512) || defined(CFL_ISA_AVX2) || defined(CFL_ISA_AMX)
#include <immintrin.h>
#endif

#if defined(CFL_ISA_AMX) || defined(CFL_ISA_AVX512)
#define CFL_VECTOR_BYTES 64
#elif defined(CFL_ISA_AVX2)
#define CFL_VECTOR_BYTES 32
#else
#define CFL_VECTOR_BYTES 16
#endif

#define CFL_INLINE inline __attribute__((always_inline))

namespace cfl::cpu::detail {
namespace {

constexpr int kBytes = CFL_VECTOR_BYTES;

typedef float F32v __attribute__((vector_size(kBytes)));
typedef double F64v __attribute__((vector_size(kBytes)));
typedef int32_t I32v __attribute__((vector_size(kBytes)));
typedef int64_t I64v __attribute__((vector_size(kBytes)));

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef F32v type;
  typedef I32v index;
  typedef int32_t lane;
};
template <>
struct VecOf<double> {
  typedef F64v type;
  typedef I64v index;
  typedef int64_t lane;
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using Index = typename VecOf<T>::index;
template <class T>
constexpr int kLanes = kBytes / int(sizeof(T));

CFL_INLINE constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
CFL_INLINE constexpr int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Exchanges bit S of the row and the lane number, for every row pair that differs in that bit.
template <class T, int S>
CFL_INLINE void transpose_step(Vec<T> (&r)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  Index<T> low, high;
  for (int l = 0; l < n; ++l) {
    low[l] = (l & S) ? n + l - S : l;
    high[l] = (l & S) ? n + l : l + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i & S) continue;
    const Vec<T> a = r[i], b = r[i + S];
    r[i] = __builtin_shuffle(a, b, low);
    r[i + S] = __builtin_shuffle(a, b, high);
  }
}

template <class T>
CFL_INLINE void transpose(Vec<T> (&r)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  transpose_step<T, 1>(r);
  if constexpr (n > 2) transpose_step<T, 2>(r);
  if constexpr (n > 4) transpose_step<T, 4>(r);
  if constexpr (n > 8) transpose_step<T, 8>(r);
}

}  // namespace
}  // namespace cfl::cpu::detail
