// Raw CPU kernel: float64 moments of a tall, narrow matrix, optionally rotated. Plain data only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cfl::cpu::detail {

// With Q = T W (or T where w is null): gram (s, s) = Q^T Q, cross (s, k) = Q^T B, summed in float64
// over the rows [begin, end). Both are overwritten; gram is symmetric.
struct TallGram {
  int64_t s = 0, k = 0;
  bool wide = false;  // T and B are double, else float
  const void* t = nullptr;
  int64_t t_row_stride = 0, t_col_stride = 1;
  const void* b = nullptr;
  int64_t b_row_stride = 0, b_col_stride = 1;
  const double* w = nullptr;  // (s, s) dense
  double* gram = nullptr;
  double* cross = nullptr;
};

struct TallGramKernel {
  size_t (*scratch_bytes)(int64_t s, int64_t k);
  void (*run)(const TallGram* args, int64_t begin, int64_t end, void* scratch);  // 64-byte aligned
};

const TallGramKernel* tall_gram_generic();
const TallGramKernel* tall_gram_avx2();
const TallGramKernel* tall_gram_avx512();

}  // namespace cfl::cpu::detail
