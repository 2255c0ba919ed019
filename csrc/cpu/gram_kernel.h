// Raw CPU kernel for weighted Gram matrices and feature-target products. Plain C++17: no torch.
//
//   gram   <- beta * gram   + sum_b s_b x_b x_b^T        (D1, D1), D1 = cols + (bias ? 1 : 0)
//   cross  <- beta * cross  + sum_b s_b x_b y_b^T        (D1, targets)
//   target_sum <- beta * target_sum + sum_b s_b y_b      (targets)
//   target_sq  <- beta * target_sq  + sum_b s_b y_b^2    (targets)
//
// With `bias`, x_b carries an implicit last entry 1. With class labels, y_b is the one-hot row of
// labels[b]. Outputs are contiguous, of type acc_dtype; beta == 0 overwrites without reading.
// `gram` is read in its upper triangle only and written whole, exactly symmetric.
//
// NaN and Inf propagate as in torch: the weight multiplies x, so a row of weight 0 that holds NaN
// still gives NaN.
#pragma once

#include <cstdint>

namespace cfl::cpu {

enum class DType : int { kF16 = 0, kBF16 = 1, kF32 = 2, kF64 = 3 };

// Instruction sets in increasing order. kAmx differs from kAvx512 for bfloat16 input only.
enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// All strides count elements and may be zero (expanded) or arbitrary.
struct GramArgs {
  int64_t rows = 0;
  int64_t cols = 0;
  const void* x = nullptr;
  DType x_dtype = DType::kF32;
  int64_t x_row_stride = 0;
  int64_t x_col_stride = 1;

  const void* weight = nullptr;  // rows entries, or null for all ones
  DType weight_dtype = DType::kF32;
  int64_t weight_stride = 1;

  bool bias = false;
  DType acc_dtype = DType::kF32;  // kF32 (not for kF64 input) or kF64; type of every output
  double beta = 0.0;
  void* gram = nullptr;  // (D1, D1), required

  int64_t targets = 0;      // K; 0 for no targets
  const void* y = nullptr;  // dense targets (rows, K) of type x_dtype, or null
  int64_t y_row_stride = 0;
  int64_t y_col_stride = 1;
  const int64_t* labels = nullptr;  // class indices (rows), or null; excludes y
  int64_t label_stride = 1;
  void* cross = nullptr;       // (D1, K), required if K > 0
  void* target_sum = nullptr;  // (K) or null
  void* target_sq = nullptr;   // (K) or null
};

// Runs fn over [begin, end) in chunks of at least grain, as at::parallel_for does.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain,
                             void (*fn)(int64_t, int64_t, void*), void* ctx);

// One call of `parallel_for` at most; null, or num_threads <= 1, runs in the calling thread. The
// result is a function of the arguments, num_threads and the ISA only (never of the schedule).
// Returns -1, or the first row whose label is outside [0, targets), in which case nothing was
// written. Scratch memory: at most 8 MB per thread, kept by the thread for its next call.
int64_t gram(const GramArgs& args, ParallelFor parallel_for = nullptr, int num_threads = 1);

// The instruction set in use: the best that the machine and the build have, unless the environment
// variable CFL_OPS_ISA (one of kIsaNames, read once; anything else raises) or set_isa asks for a
// lower one.
Isa isa();
constexpr const char* kIsaNames[] = {"generic", "avx2", "avx512", "amx"};  // in the order of Isa
Isa best_isa();
void set_isa(Isa isa);  // clamped to best_isa(); not to be called while gram() runs
const char* isa_name(Isa isa);

}  // namespace cfl::cpu
