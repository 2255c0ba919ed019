// proximal_step on the CPU: one chain of BLAS calls on the smaller side of the problem.
// Semantics: python/cfl_ops/ops/proximal/step.py (the fallback); mathematics: docs/formulas.md,
// 1.2-1.6.
//
// With t the total penalty, mu the proximal one and the anchor Wa = (mu / t) W:
//   dual (B < D):    A = (P P^T + t I)^-1 (Y - Phi Wa^T),  W <- Wa + A^T P,  residual = t A
//   primal (B >= D): (P^T P + t I) W^T = (Y^T P + t Wa)^T, the residual recomputed
// Both are solved in the working precision where that resolves the system, else in float64.
//
// The loss is that of the head as it is stored. Where a bound on the rounding errors allows it, the
// dual residual t A is taken for the head's own; else the residual is computed from the head; and
// where float32 could spoil the head itself, the step is taken in float64 (step_in_float64), the
// head refined by its own residual, rounded, and the bias fitted to the rounded weight.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/blas.h"
#include "cpu/gram_kernel.h"
#include "cpu/kept_memory.h"
#include "cpu/spd_kernel.h"
#include "cpu/tensor.h"

namespace cfl::cpu {
namespace {

enum Info : int32_t {
  kBadFeatures = -1,
  kBadTarget = -2,
  kBadWeight = -3,
  kBadPenalty = -4,
  kBadSampleWeight = -5,
};

// The options as the ops take them: the numbers of python/cfl_ops/ops/proximal/codes.py.
enum Reduction : int64_t { kMean, kSum };
enum BiasFit : int64_t { kPenalized, kFree };
enum Method : int64_t { kAuto, kCholesky, kConjugateGradients };
struct Options {
  Reduction reduction;
  BiasFit fit_bias;
  Method method;
};

// Whether a float32 solution has 5 digits. The spread of the pivots estimates the condition number
// from below; on ReLU features with B and D from 32 to 1024 and lambda from 1 to 1e-3 the relative
// error of the head stayed under a third of this estimate. Past it the solution is refined, or
// computed in float64.
bool trusted(double spread, int64_t order) {
  constexpr double kTrustedError = 1.5e-5;
  return std::numeric_limits<float>::epsilon() / 2 * spread * spread *
             std::sqrt(static_cast<double>(order)) <
         kTrustedError;
}

// A head whose rounding errors are bounded by this, relative to it, has them, too; and a gradient
// is good to this, which comes with its residual.
constexpr double kTrustedHead = 5e-6, kTrustedResidual = 1e-4;

// Sums of equal terms, of which an accumulator takes 64 and more, err by so many units.
constexpr double kSums = 8;

// The rounding errors of a residual R, relative to it, at which the loss is still right to 5 %. The
// gradient weighs rows by S R, not by S^1/2 R: with unequal weights the errors are held against
// |S R| / max(S)^1/2, which is never more than |S^1/2 R|.
constexpr double kSmallError = 0.02;
// And relative to the targets: a loss below 1e-9 of their mean square is 0 for all that anybody
// does with it. (Steps on one batch over and over come there.)
constexpr double kNegligibleError = 5e-6;
// A step that is not good enough in its working precision: of a float32 step the float64 one
// decides.
constexpr int64_t kInaccurate = -200;

// Whether an error of the residual leaves the loss below twice the best one plus a thousandth of
// the targets' mean square. `own` is the norm of the residual that the head has, which the error
// may have raised.
bool tolerable(double error, double own, double targets) {
  return error <= 0.4 * std::max(0.0, own - error) + 0.014 * targets;
}

template <class T>
constexpr double kUnit = std::numeric_limits<T>::epsilon() / 2;  // unit roundoff

template <class T>
constexpr ScalarType kScalarType =
    std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;

template <class T>
constexpr DType kDType = std::is_same_v<T, float> ? DType::kF32 : DType::kF64;

// Whether the squares of a system, of this size, and what is solved with it are well within T.
template <class T>
bool in_range(double square) {
  const double most = std::is_same_v<T, float> ? 0x1p64 : 0x1p800;
  return square < most && square > 1 / most;
}
// Multipliers that are not 0 and have no larger norm may have underflown.
template <class T>
constexpr double kLeastAlpha = std::is_same_v<T, float> ? 1e-28 : 1e-280;

template <class T>
bool all_finite(const T* values, int64_t rows, int64_t cols, int64_t stride) {
  // The sum of x - x is 0, or NaN as soon as one value is NaN or Inf; no branch, so it vectorises.
  for (int64_t i = 0; i < rows; ++i) {
    T sum = 0;
    for (int64_t j = 0; j < cols; ++j) sum += values[i * stride + j] - values[i * stride + j];
    if (!(sum == 0)) return false;
  }
  return true;
}

// to (cols x rows, dense) = transpose of from (rows x cols, dense), a tile at a time: a column of a
// large matrix touches a line for each element.
template <class T>
void transpose(int64_t rows, int64_t cols, const T* from, T* to) {
  constexpr int64_t kTile = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += kTile) {
    const int64_t i1 = std::min(i0 + kTile, rows);
    for (int64_t j0 = 0; j0 < cols; j0 += kTile) {
      const int64_t j1 = std::min(j0 + kTile, cols);
      for (int64_t j = j0; j < j1; ++j) {
        for (int64_t i = i0; i < i1; ++i) to[j * rows + i] = from[i * cols + j];
      }
    }
  }
}

template <class T>
double sum_of_squares(const T* values, int64_t rows, int64_t cols, int64_t stride) {
  if (stride == cols) {
    cols *= rows;
    rows = 1;
  }
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) total += dot(cols, values + i * stride, values + i * stride);
  return total;
}

// What is stored of a value in a tensor of `dtype`.
template <class T>
T stored(T value, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return static_cast<T>(static_cast<float>(value));
    case ScalarType::Half:
      return static_cast<float>(torch::headeronly::Half(static_cast<float>(value)));
    case ScalarType::BFloat16:
      return static_cast<float>(torch::headeronly::BFloat16(static_cast<float>(value)));
    default:
      return value;
  }
}

// Below this many iterations conjugate gradients are not worth starting.
constexpr int64_t kLeastIterations = 24;

// Up to how many rows the Gram kernel serves the forward product, too: there it outruns gemm.
constexpr int64_t kFusedRows = 4096;

// One head and one batch, all in T, rows contiguous within themselves.
template <class T>
struct Problem {
  int64_t rows, width, targets;
  const T* phi;
  int64_t phi_stride;
  const T* target;  // dense (rows, targets), or null
  int64_t target_stride;
  const int64_t* labels;  // or null
  int64_t label_stride;
  T* weight;               // (targets, width) contiguous: old in, new out
  T* bias;                 // (targets) or null
  const T* sample;         // (rows) contiguous weights, or null
  const double* lam_diag;  // (width) contiguous, or null
  double lam, ridge;
  bool mean, free_bias;
  Method method;
  ScalarType weight_dtype, bias_dtype;  // what the new head is rounded to
  T* grad;                              // (rows, width) contiguous
  double loss;                          // out

  T target_of(int64_t row, int64_t k) const {
    return target ? target[row * target_stride + k] : T(labels[row * label_stride] == k);
  }
  T sample_of(int64_t row) const { return sample ? sample[row] : T(1); }
  bool rounds() const {
    return weight_dtype != kScalarType<T> || (bias && bias_dtype != kScalarType<T>);
  }
};

// Memory for a step, of which a thread keeps up to kKept bytes for its next one.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    size_t kept = 0;
    for (KeptMemory& block : pool()) {
      kept += block.size();
      if (kept > kKept) block.release();
    }
  }

  template <class T>
  T* take(int64_t count) {
    auto& blocks = pool();
    if (used_ == blocks.size()) blocks.emplace_back();
    return blocks[used_++].get<T>(static_cast<size_t>(count));
  }

 private:
  static constexpr size_t kKept = 64 << 20;
  static std::vector<KeptMemory>& pool() {
    static thread_local std::vector<KeptMemory> blocks;
    return blocks;
  }
  size_t used_ = 0;
};

// max diagonal / min pivot of a system whose Cholesky factor is L: how many digits the
// factorisation may have lost, at least. Also tells the first pivot that drowned in rounding (order
// from 1), or 0.
template <class T>
double pivot_spread(const T* factor, int64_t order, int64_t stride, const std::vector<T>& diagonal,
                    int64_t* lost) {
  double largest = 0, smallest = std::numeric_limits<double>::infinity();
  *lost = 0;
  const double floor = static_cast<double>(order) * std::numeric_limits<T>::epsilon();
  for (int64_t i = 0; i < order; ++i) {
    const double pivot = static_cast<double>(factor[i * stride + i]) * factor[i * stride + i];
    if (*lost == 0 && !(pivot > floor * static_cast<double>(diagonal[i]))) *lost = i + 1;
    largest = std::max(largest, static_cast<double>(diagonal[i]));
    smallest = std::min(smallest, pivot);
  }
  return order == 0 ? 1.0 : largest / smallest;
}

// Factors the system in place; info as LAPACK's, also for a pivot lost in rounding.
template <class T>
int64_t factor(T* system, int64_t order, double* spread) {
  std::vector<T> diagonal(order);
  for (int64_t i = 0; i < order; ++i) diagonal[i] = system[i * order + i];
  int64_t info = potrf_lower(order, system, order);
  int64_t lost = 0;
  *spread = pivot_spread(system, order, order, diagonal, &lost);
  return info != 0 ? info : lost;
}

// Up to this order the kernel of spd_kernel.h outruns BLAS.
constexpr int64_t kSpdOrder = 384;
// And up to so many numbers, which a core's second cache holds, its products the Gram kernel.
constexpr int64_t kUnpacked = 128 << 10;

const detail::SpdKernel& spd_kernel() {
  switch (isa()) {
#if defined(CFL_HAVE_X86_ISAS)
    case Isa::kAmx:
    case Isa::kAvx512:
      return *detail::spd_avx512();
    case Isa::kAvx2:
      return *detail::spd_avx2();
#endif
    default:
      return *detail::spd_generic();
  }
}

// A system and its right sides as that kernel takes them.
template <class T>
class SmallSystem {
 public:
  SmallSystem(int64_t order, int64_t k, Scratch& scratch)
      : order_(order), k_(k), right_(aligned(order)), stride_(right_ + aligned(k)) {
    matrix_ = scratch.take<T>(order * stride_);
  }

  // Row i of system + level root root^T, and of the right sides.
  template <class S>
  void fill_row(int64_t i, const T* system, double level, const S* root, const T* rhs) {
    T* row = matrix_ + i * stride_;
    const T lift = static_cast<T>(level * root[i]);
    for (int64_t j = i / detail::kSpdColumns * detail::kSpdColumns; j < order_; ++j) {
      row[j] = system[j] + lift * static_cast<T>(root[j]);
    }
    std::fill(row + order_, row + right_, T(0));
    std::copy_n(rhs, k_, row + right_);
    std::fill(row + right_ + k_, row + stride_, T(0));
  }
  // The system P P^T and the right sides P W^T, for P (order, width) and W (k, width).
  void fill(const T* p, int64_t p_stride, const T* w, int64_t width) {
    for (int64_t i = 0; i < order_; ++i) {
      std::fill(matrix_ + i * stride_ + order_ / 16 * 16, matrix_ + (i + 1) * stride_, T(0));
    }
    const detail::SpdProducts args{order_, k_, width, p, p_stride, w, width, matrix_};
    (std::is_same_v<T, float> ? spd_kernel().products_f32 : spd_kernel().products_f64)(&args);
  }
  const T* right(int64_t i) const { return matrix_ + i * stride_ + right_; }
  // Row i again, as above, of the system that is there.
  template <class S>
  void lift_row(int64_t i, double level, const S* root, const T* rhs) {
    T* row = matrix_ + i * stride_;
    const T lift = static_cast<T>(level * root[i]);
    for (int64_t j = i; level > 0 && j < order_; ++j) row[j] += lift * static_cast<T>(root[j]);
    std::copy_n(rhs, k_, row + right_);
  }
  T& diagonal(int64_t i) { return matrix_[i * stride_ + i]; }

  // As factor() and potrs_lower().
  int64_t solve(T* rhs, double* spread) {
    std::vector<T> before(order_);
    for (int64_t i = 0; i < order_; ++i) before[i] = diagonal(i);
    const detail::SpdSystem args{order_, k_, matrix_};
    const int64_t info =
        std::is_same_v<T, float> ? spd_kernel().f32(&args) : spd_kernel().f64(&args);
    if (info != 0) return info;
    int64_t lost = 0;
    *spread = pivot_spread(matrix_, order_, stride_, before, &lost);
    if (lost != 0) return lost;
    for (int64_t i = 0; i < order_; ++i)
      std::copy_n(matrix_ + i * stride_ + right_, k_, rhs + i * k_);
    return 0;
  }

  // The factor as potrf_lower leaves it.
  void lower(T* to) const {
    for (int64_t i = 0; i < order_; ++i) {
      for (int64_t j = 0; j <= i; ++j) to[i * order_ + j] = matrix_[j * stride_ + i];
    }
  }

 private:
  static int64_t aligned(int64_t n) {
    return (n + detail::kSpdColumns - 1) / detail::kSpdColumns * detail::kSpdColumns;
  }
  int64_t order_, k_, right_, stride_;
  T* matrix_;
};

void run_gram(const GramArgs& args) {
  const int64_t work = args.rows * args.cols * (args.cols + 2 * args.targets);
  const bool parallel = work > 8'000'000;  // else a region costs more
  cfl::cpu::gram(args, parallel ? &cfl::parallel_for : nullptr,
                 parallel ? static_cast<int>(torch::stable::get_num_threads()) : 1);
}

// The Gram matrix, in Acc, of the rows (B x B) or columns (D x D) of p (rows x width).
template <class T, class Acc>
void side_gram(bool of_rows, const Problem<T>& pb, const T* p, int64_t stride, const T* sample,
               bool ones, Acc* out, Acc* cross) {
  GramArgs args;
  args.rows = of_rows ? pb.width : pb.rows;
  args.cols = of_rows ? pb.rows : pb.width;
  args.x = p;
  args.x_dtype = kDType<T>;
  args.x_row_stride = of_rows ? 1 : stride;
  args.x_col_stride = of_rows ? stride : 1;
  args.weight = sample;
  args.weight_dtype = kDType<T>;
  args.bias = ones;
  args.acc_dtype = kDType<Acc>;
  args.gram = out;
  if (cross) {
    args.targets = pb.targets;
    args.y = pb.target;
    args.y_row_stride = pb.target_stride;
    args.labels = pb.labels;
    args.label_stride = pb.label_stride;
    args.cross = cross;
  }
  run_gram(args);
}

// P P^T (B x B) and P W^T (B x K) in one pass over P, whose rows are packed once for both.
template <class T>
void row_gram_and_forward(const Problem<T>& pb, const T* weight, T* system, T* forward) {
  GramArgs args;
  args.rows = pb.width;
  args.cols = pb.rows;
  args.x = pb.phi;
  args.y = weight;
  args.x_dtype = args.acc_dtype = kDType<T>;
  args.x_row_stride = args.y_row_stride = 1;
  args.x_col_stride = pb.phi_stride;
  args.y_col_stride = pb.width;
  args.gram = system;
  args.targets = pb.targets;
  args.cross = forward;
  run_gram(args);
}

// The system P P^T + ones_scale root root^T + t I, applied to a vector in float64.
struct RowOperator {
  const float* p;
  int64_t stride, rows, width;
  const float* root;  // or null
  double ones_scale, t;

  // out (rows, k) = system a, a block of rows of P widened at a time.
  void apply(const double* a, int64_t k, double* out, double* block, double* projection) const {
    std::fill_n(projection, width * k, 0.0);
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t begin = 0; begin < rows; begin += kBlock) {
        const int64_t n = std::min(kBlock, rows - begin);
        for (int64_t i = 0; i < n; ++i) {
          const float* row = p + (begin + i) * stride;
          for (int64_t j = 0; j < width; ++j) block[i * width + j] = row[j];
        }
        if (pass == 0) {
          gemm(true, false, width, k, n, 1.0, block, width, a + begin * k, k, 1.0, projection, k);
        } else {
          gemm(false, false, n, k, width, 1.0, block, width, projection, k, 0.0, out + begin * k,
               k);
        }
      }
    }
    for (int64_t c = 0; c < k; ++c) {
      double sum = 0;
      for (int64_t i = 0; root && i < rows; ++i) sum += static_cast<double>(root[i]) * a[i * k + c];
      for (int64_t i = 0; i < rows; ++i) {
        out[i * k + c] += t * a[i * k + c] + (root ? ones_scale * root[i] * sum : 0.0);
      }
    }
  }
  static constexpr int64_t kBlock = 64;
};

// Iterative refinement of x (rows, k): float32 factor, float64 residual. Each step multiplies the
// error by about that of the factor; false if it does not converge, with x as it was.
bool refine(const RowOperator& op, const float* factor, const float* q, float* x, int64_t k,
            Scratch& scratch) {
  const int64_t size = op.rows * k;
  double* solution = scratch.take<double>(size);
  double* residual = scratch.take<double>(size);
  double* block = scratch.take<double>(RowOperator::kBlock * op.width);
  double* projection = scratch.take<double>(op.width * k);
  float* correction = scratch.take<float>(size);
  for (int64_t i = 0; i < size; ++i) solution[i] = x[i];
  double last = 0.1;  // a first correction of a tenth means a factor without digits
  for (int step = 0; step < 4; ++step) {
    op.apply(solution, k, residual, block, projection);
    double largest = 0;
    for (int64_t i = 0; i < size; ++i) {
      residual[i] = q[i] - residual[i];
      largest = std::max(largest, std::abs(residual[i]));
    }
    if (largest == 0) break;
    if (!std::isfinite(largest)) return false;
    for (int64_t i = 0; i < size; ++i) correction[i] = static_cast<float>(residual[i] / largest);
    potrs_lower(op.rows, k, factor, op.rows, correction, k);
    double change = 0, norm = 0;
    for (int64_t i = 0; i < size; ++i) {
      const double delta = largest * correction[i];
      solution[i] += delta;
      change += delta * delta;
      norm += solution[i] * solution[i];
    }
    const double relative = std::sqrt(change / norm);
    if (!(relative <= last)) return false;
    // The next correction would be about relative^2: below float32's digits.
    if (relative < 2e-4) break;
    if (step == 3) return false;
    last = relative / 4;
  }
  for (int64_t i = 0; i < size; ++i) x[i] = static_cast<float>(solution[i]);
  return true;
}

struct Penalties {
  double scale;  // of the loss: the sum of the weights, or 1
  double mu, t;  // per feature where there is no lam_diag
  double t_bias;
  double shrink, shrink_bias;  // anchor = shrink * old
};

double ratio(double mu, double t) { return t > 0 ? mu / t : 1.0; }

// Multiply-adds of the direct solve on the smaller side, and of one conjugate-gradient iteration.
double direct_work(int64_t rows, int64_t width, int64_t k) {
  const double n = static_cast<double>(std::min(rows, width)),
               m = static_cast<double>(std::max(rows, width));
  return n * n * m / 2 + n * n * n / 6 + n * n * static_cast<double>(k);
}
// Fewer than 32 right sides leave an iteration bound by reading the features twice.
double iteration_work(int64_t rows, int64_t width, int64_t k) {
  return 2.0 * static_cast<double>(rows) * static_cast<double>(width) *
         static_cast<double>(std::max<int64_t>(k, 32));
}

// How many conjugate-gradient iterations to try before the direct solve; 0 for none. "auto" risks a
// quarter of the direct solve, and only where that buys enough iterations to have a chance.
int64_t cg_budget(Method method, int64_t rows, int64_t width, int64_t k) {
  if (method == kCholesky) return 0;
  const double ratio = direct_work(rows, width, k) / iteration_work(rows, width, k);
  if (method == kConjugateGradients) return std::max<int64_t>(200, static_cast<int64_t>(2 * ratio));
  const auto budget = static_cast<int64_t>(ratio / 4);
  return budget >= kLeastIterations ? budget : 0;
}

// The system of either side as an operator on (order, k), and its diagonal.
template <class T>
struct SystemOperator {
  bool dual;
  const T* p;
  int64_t stride, rows, width;
  const T* sample;     // primal: row weights, or null
  const T* root;       // dual: the column of ones, weighted, or null
  bool bias;           // primal: a last feature that is 1
  double ones_scale;   // of the dual's column of ones
  const T* penalties;  // (order)
  int64_t order;

  // through (rows or width, k) is scratch.
  void apply(const T* a, int64_t k, T* out, T* through) const {
    if (dual) {
      gemm(true, false, width, k, rows, T(1), p, stride, a, k, T(0), through, k);
      gemm(false, false, rows, k, width, T(1), p, stride, through, k, T(0), out, k);
      std::vector<double> sums(root ? k : 0, 0.0);
      for (int64_t i = 0; root && i < rows; ++i) {
        for (int64_t c = 0; c < k; ++c) sums[c] += ones_scale * root[i] * a[i * k + c];
      }
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t c = 0; c < k; ++c) {
          out[i * k + c] +=
              penalties[i] * a[i * k + c] + (root ? static_cast<T>(root[i] * sums[c]) : T(0));
        }
      }
      return;
    }
    gemm(false, false, rows, k, width, T(1), p, stride, a, k, T(0), through, k);
    std::vector<double> sums(k, 0.0);
    for (int64_t i = 0; i < rows; ++i) {
      const T s = sample ? sample[i] : T(1);
      for (int64_t c = 0; c < k; ++c) {
        T& value = through[i * k + c];
        value = s * (bias ? value + a[width * k + c] : value);
        sums[c] += value;
      }
    }
    gemm(true, false, width, k, rows, T(1), p, stride, through, k, T(0), out, k);
    for (int64_t c = 0; bias && c < k; ++c) out[width * k + c] = static_cast<T>(sums[c]);
    for (int64_t j = 0; j < order; ++j) {
      for (int64_t c = 0; c < k; ++c) out[j * k + c] += penalties[j] * a[j * k + c];
    }
  }

  void diagonal(T* out) const {
    std::fill_n(out, order, T(0));
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const T s = sample ? sample[i] : T(1);
      total += s;
      for (int64_t j = 0; j < width; ++j) {
        const T value = p[i * stride + j];
        out[dual ? i : j] += s * value * value;
      }
    }
    if (!dual && bias) out[width] = static_cast<T>(total);
    for (int64_t i = 0; i < order; ++i) {
      out[i] += penalties[i];
      if (dual && root) out[i] += static_cast<T>(ones_scale * root[i] * root[i]);
    }
  }
};

// Conjugate gradients with a diagonal preconditioner, every column of b (order, k) on its own, from
// x = 0: the unknown is the change of the head, so that is the warm start. Converged when each
// column's true residual b - A x is below the tolerance; then b holds that residual. False
// otherwise, with b as it was.
template <class T>
bool conjugate_gradient(const SystemOperator<T>& op, T* b, T* x, int64_t k, int64_t budget,
                        Scratch& scratch) {
  const double tolerance = std::is_same_v<T, float> ? 1e-6 : 1e-12;
  const int64_t n = op.order, size = n * k;
  T* r = scratch.take<T>(size);
  T* z = scratch.take<T>(size);
  T* direction = scratch.take<T>(size);
  T* image = scratch.take<T>(size);
  T* through = scratch.take<T>((op.dual ? op.width : op.rows) * k);
  std::vector<T> inverse(n);
  op.diagonal(inverse.data());
  for (T& value : inverse) {
    if (!(value > 0)) return false;
    value = 1 / value;
  }
  auto dots = [&](const T* a, const T* c, std::vector<double>& out) {
    std::fill(out.begin(), out.end(), 0.0);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < k; ++j) out[j] += static_cast<double>(a[i * k + j]) * c[i * k + j];
    }
  };
  std::vector<double> target(k), rho(k), next(k), curvature(k), norms(k);
  dots(b, b, target);
  std::fill_n(x, size, T(0));
  std::memcpy(r, b, size * sizeof(T));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) direction[i * k + j] = inverse[i] * r[i * k + j];
  }
  dots(r, direction, rho);
  auto converged = [&]() {
    dots(r, r, norms);
    for (int64_t j = 0; j < k; ++j) {
      if (!(norms[j] <= tolerance * tolerance * target[j])) return false;
    }
    return true;
  };
  for (int64_t step = 0; step < budget; ++step) {
    op.apply(direction, k, image, through);
    dots(direction, image, curvature);
    for (int64_t j = 0; j < k; ++j) {
      if (!std::isfinite(curvature[j])) return false;
      curvature[j] =
          curvature[j] > 0 ? rho[j] / curvature[j] : 0.0;  // a column that is done stands still
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        const T alpha = static_cast<T>(curvature[j]);
        x[i * k + j] += alpha * direction[i * k + j];
        r[i * k + j] -= alpha * image[i * k + j];
        z[i * k + j] = inverse[i] * r[i * k + j];
      }
    }
    if (converged()) {  // by the recursion; now in truth
      op.apply(x, k, image, through);
      for (int64_t i = 0; i < size; ++i) r[i] = b[i] - image[i];
      dots(r, r, norms);
      for (int64_t j = 0; j < k; ++j) {
        if (!(norms[j] <= 100 * tolerance * tolerance * target[j])) return false;
      }
      std::memcpy(b, r, size * sizeof(T));
      return true;
    }
    dots(r, z, next);
    for (int64_t j = 0; j < k; ++j) {
      const double beta = rho[j] > 0 ? next[j] / rho[j] : 0.0;
      rho[j] = next[j];
      curvature[j] = beta;
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        direction[i * k + j] = z[i * k + j] + static_cast<T>(curvature[j]) * direction[i * k + j];
      }
    }
  }
  return false;
}

// residual (B, K) = Y - Phi W^T - b, bias null for none.
template <class T>
void residual_of(const Problem<T>& pb, const T* weight, const T* bias, T* residual) {
  const int64_t B = pb.rows, D = pb.width, K = pb.targets;
  for (int64_t i = 0; i < B; ++i) {
    for (int64_t k = 0; k < K; ++k) {
      residual[i * K + k] = pb.target_of(i, k) - (bias ? bias[k] : T(0));
    }
  }
  gemm(false, true, B, K, D, T(-1), pb.phi, pb.phi_stride, weight, D, T(1), residual, K);
}

// The same without a bias, of a float32 head but with no rounding worth the name: a block of rows
// widened at a time.
void residual_in_float64(const Problem<float>& pb, const float* weight, double* residual,
                         Scratch& scratch) {
  constexpr int64_t kBlock = 64;
  const int64_t B = pb.rows, D = pb.width, K = pb.targets;
  double* wide = scratch.take<double>(K * D);
  double* block = scratch.take<double>(kBlock * D);
  std::copy_n(weight, K * D, wide);
  for (int64_t begin = 0; begin < B; begin += kBlock) {
    const int64_t n = std::min(kBlock, B - begin);
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(pb.phi + (begin + i) * pb.phi_stride, D, block + i * D);
      for (int64_t k = 0; k < K; ++k) residual[(begin + i) * K + k] = pb.target_of(begin + i, k);
    }
    gemm(false, true, n, K, D, -1.0, block, D, wide, D, 1.0, residual + begin * K, K);
  }
}

// The bias (K) that fits best beside a weight whose residual without a bias is given; taken off it.
template <class T, class R>
void fit_bias(const Problem<T>& pb, const Penalties& pen, const T* anchor_bias, R* residual,
              T* bias) {
  const int64_t B = pb.rows, K = pb.targets;
  const double pull = pb.free_bias ? 0.0 : pen.t_bias;
  double total = pull;
  std::vector<double> sums(K, 0.0);
  for (int64_t i = 0; i < B; ++i) {
    const double s = pb.sample_of(i);
    total += s;
    for (int64_t k = 0; k < K; ++k) sums[k] += s * residual[i * K + k];
  }
  for (int64_t k = 0; k < K; ++k) {
    bias[k] = stored(static_cast<T>((sums[k] + pull * anchor_bias[k]) / total), pb.bias_dtype);
  }
  for (int64_t i = 0; i < B; ++i) {
    for (int64_t k = 0; k < K; ++k) residual[i * K + k] -= bias[k];
  }
}

// The squared norm of the rows of (B, K) values, weighted.
template <class T>
double weighted_squares(const Problem<T>& pb, const T* values) {
  double total = 0;
  for (int64_t i = 0; i < pb.rows; ++i) {
    total += pb.sample_of(i) * sum_of_squares(values + i * pb.targets, 1, pb.targets, pb.targets);
  }
  return total;
}

// Before a step of refinement is made: whether what the head misses is little, or no longer falls.
// In half precision a head shows digits that its loss did not before it was rounded: a few steps
// make them right.
template <class T>
bool refinement_ends(const Problem<T>& pb, int step, double error, double best, double last) {
  if (error <= 1e-3 * best) return !pb.rounds() || step >= 3;
  return !(error <= 0.5 * last);
}

template <class T>
double total_of(const Problem<T>& pb) {  // of the row weights
  double total = 0;
  for (int64_t i = 0; i < pb.rows; ++i) total += pb.sample_of(i);
  return total;
}

// By differences from the first row: of a constant feature it is that constant.
template <class T>
std::vector<double> mean_features(const Problem<T>& pb) {
  std::vector<double> mean(pb.width, 0.0);
  for (int64_t i = 1; i < pb.rows; ++i) {
    const double s = pb.sample_of(i);
    const T* row = pb.phi + i * pb.phi_stride;
    for (int64_t j = 0; j < pb.width; ++j) {
      mean[j] += s * (static_cast<double>(row[j]) - static_cast<double>(pb.phi[j]));
    }
  }
  const double total = total_of(pb);
  for (int64_t j = 0; j < pb.width; ++j) mean[j] = mean[j] / total + pb.phi[j];
  return mean;
}

template <class T>
double targets_norm(const Problem<T>& pb) {
  if (pb.labels) return std::sqrt(total_of(pb));
  double total = 0;
  for (int64_t i = 0; i < pb.rows; ++i) {
    double row = 0;
    for (int64_t k = 0; k < pb.targets; ++k) {
      const double y = pb.target[i * pb.target_stride + k];
      row += y * y;
    }
    total += pb.sample_of(i) * row;
  }
  return std::sqrt(total);
}

// Whether the rounding errors of a residual show in loss and gradient. NaN, where a norm left the
// range of T, does.
template <class T>
bool shows(const Problem<T>& pb, double noise, double worth) {
  return !(noise <= kSmallError * worth) && !(noise <= kNegligibleError * targets_norm(pb));
}

// The head (weight (K, D), bias (K)) as it is stored, and its own residual (B, K), which has errors
// of up to `error` times itself.
template <class T>
void settle(const Problem<T>& pb, const Penalties& pen, const T* anchor_bias, T* weight, T* bias,
            T* residual, double error, Scratch& scratch) {
  const int64_t size = pb.rows * pb.targets;
  for (int64_t i = 0; i < pb.targets * pb.width; ++i)
    weight[i] = stored(weight[i], pb.weight_dtype);
  if constexpr (std::is_same_v<T, float>) {
    if (!(error <= kSmallError / 2)) {
      double* wide = scratch.take<double>(size);
      residual_in_float64(pb, weight, wide, scratch);
      if (pb.bias) fit_bias(pb, pen, anchor_bias, wide, bias);
      for (int64_t i = 0; i < size; ++i) residual[i] = static_cast<float>(wide[i]);
      return;
    }
  }
  residual_of<T>(pb, weight, nullptr, residual);
  if (pb.bias) fit_bias(pb, pen, anchor_bias, residual, bias);
}

// Loss and gradient of a head from its residual, which is scaled by the row weights; then the head
// is written. -100 where one of them is not finite.
template <class T>
int64_t write_step(Problem<T>& pb, const Penalties& pen, const T* weight, const T* bias,
                   T* residual) {
  const int64_t B = pb.rows, D = pb.width, K = pb.targets;
  pb.loss = weighted_squares(pb, residual) / pen.scale;
  if (!std::isfinite(pb.loss) || !all_finite(weight, K, D, D)) return -100;
  if (pb.bias && !all_finite(bias, 1, K, K)) return -100;
  for (int64_t i = 0; pb.sample && i < B; ++i) {
    for (int64_t k = 0; k < K; ++k) residual[i * K + k] *= pb.sample[i];
  }
  gemm(false, false, B, D, K, static_cast<T>(-2.0 / pen.scale), residual, K, weight, D, T(0),
       pb.grad, D);
  std::memcpy(pb.weight, weight, K * D * sizeof(T));
  if (pb.bias) std::memcpy(pb.bias, bias, K * sizeof(T));
  return 0;
}

template <class T>
int64_t dual_step(Problem<T>& pb, const Penalties& pen, const std::vector<double>& t_diag) {
  const int64_t B = pb.rows, D = pb.width, K = pb.targets;
  Scratch scratch;
  const bool ones = pb.bias && !pb.free_bias, centred = pb.bias && pb.free_bias;

  // q = root (Y - Phi Wa^T - b_a); the anchor's shrinkage rides in alpha where it is one number.
  T* q = scratch.take<T>(B * K);
  std::vector<T> anchor_bias(pb.bias ? K : 0);
  for (int64_t k = 0; pb.bias && k < K; ++k) {
    // A free bias does not depend on the old one, which may be so large that targets drown in it.
    anchor_bias[k] = pb.free_bias ? T(0) : static_cast<T>(pb.bias[k] * pen.shrink_bias);
  }
  const T* anchor = pb.weight;
  double anchor_scale = pen.shrink;
  if (pb.lam_diag && pb.ridge > 0) {
    T* copy = scratch.take<T>(K * D);
    const double rho = pen.t - pen.mu;
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < D; ++j) {
        copy[k * D + j] = static_cast<T>(pb.weight[k * D + j] * ratio(t_diag[j] - rho, t_diag[j]));
      }
    }
    anchor = copy;
    anchor_scale = 1.0;
  }
  // The system's Gram matrix comes with the forward product where it is that of Phi itself.
  const int64_t budget = pen.t > 0 ? cg_budget(pb.method, B, D, K) : 0;
  T* gram = nullptr;
  std::tuple<std::optional<SmallSystem<float>>, std::optional<SmallSystem<double>>> kernels;
  auto& fused = std::get<std::optional<SmallSystem<T>>>(kernels);
  const bool plain = budget == 0 && !centred && !pb.sample && !pb.lam_diag;
  if (plain && B <= kSpdOrder && (B + K) * D <= kUnpacked) {
    fused.emplace(B, K, scratch).fill(pb.phi, pb.phi_stride, anchor, D);
    for (int64_t i = 0; i < B; ++i) std::copy_n(fused->right(i), K, q + i * K);
  } else if (plain && B <= kFusedRows) {
    gram = scratch.take<T>(B * B);
    row_gram_and_forward(pb, anchor, gram, q);
  }
  for (int64_t i = 0; i < B; ++i) {
    for (int64_t k = 0; k < K; ++k) {
      const T y = pb.target ? pb.target[i * pb.target_stride + k] : T(0);
      const T start = pb.bias ? y - anchor_bias[k] : y;
      q[i * K + k] = gram || fused ? start - static_cast<T>(anchor_scale) * q[i * K + k] : start;
    }
    if (pb.labels) q[i * K + pb.labels[i * pb.label_stride]] += T(1);
  }
  if (!gram && !fused) {
    gemm(false, true, B, K, D, static_cast<T>(-anchor_scale), pb.phi, pb.phi_stride, anchor, D,
         T(1), q, K);
  }

  // P: the features, centred and scaled by the root of the row weights. Most steps need no copy.
  const T* p = pb.phi;
  int64_t p_stride = pb.phi_stride;
  std::vector<T> root(B, T(1));
  std::vector<double> mean_phi, mean_q;
  if (pb.sample) {
    for (int64_t i = 0; i < B; ++i) root[i] = std::sqrt(pb.sample[i]);
  }
  if (centred) {
    std::vector<double> q_sum(K, 0.0);
    for (int64_t i = 0; i < B; ++i) {
      for (int64_t k = 0; k < K; ++k)
        q_sum[k] += static_cast<double>(pb.sample_of(i)) * q[i * K + k];
    }
    mean_phi = mean_features(pb);
    mean_q.resize(K);
    for (int64_t k = 0; k < K; ++k) mean_q[k] = q_sum[k] / total_of(pb);
  }
  if (pb.sample || centred) {
    T* copy = scratch.take<T>(B * D);
    for (int64_t i = 0; i < B; ++i) {
      for (int64_t j = 0; j < D; ++j) {
        const T value = pb.phi[i * pb.phi_stride + j];
        copy[i * D + j] = root[i] * (centred ? static_cast<T>(value - mean_phi[j]) : value);
      }
      for (int64_t k = 0; k < K; ++k) {
        const T value = q[i * K + k];
        q[i * K + k] = root[i] * (centred ? static_cast<T>(value - mean_q[k]) : value);
      }
    }
    p = copy;
    p_stride = D;
  }
  // With a penalty for each feature, the system is P diag(1/t) P^T + I.
  const T* pe = p;
  int64_t pe_stride = p_stride;
  double t = pen.t, ones_scale = 1.0;
  T* half = nullptr;  // P diag(t)^-1/2, whose Gram matrix is the system's
  if (pb.lam_diag) {
    for (const double penalty : t_diag) {
      if (!in_range<T>(penalty)) return kInaccurate;
    }
    T* copy = scratch.take<T>(B * D);
    half = scratch.take<T>(B * D);
    for (int64_t i = 0; i < B; ++i) {
      for (int64_t j = 0; j < D; ++j) {
        const double value = p[i * p_stride + j];
        copy[i * D + j] = static_cast<T>(value / t_diag[j]);
        half[i * D + j] = static_cast<T>(value / std::sqrt(t_diag[j]));
      }
    }
    pe = copy;
    pe_stride = D;
    t = 1.0;
    ones_scale = 1.0 / pen.t_bias;
  }

  double trace = 0;  // of the system without its penalty
  auto solve = [&]<class Acc>(Acc* rhs, Acc* system, double* spread) -> int64_t {
    trace = 0;
    auto& small = std::get<std::optional<SmallSystem<Acc>>>(kernels);
    const bool ready = small.has_value();
    if (!ready && static_cast<void*>(system) != gram) {
      side_gram<T, Acc>(true, pb, half ? half : p, half ? D : p_stride, nullptr, false, system,
                        nullptr);
    }
    double squares = 0, level = ones ? ones_scale : 0;
    for (int64_t i = 0; i < B; ++i) {
      trace += ready ? small->diagonal(i) : system[i * B + i];
      squares += root[i] * root[i];
    }
    // Centred rows leave the direction of the roots to the penalty alone. No right side has a part
    // in it, so that whatever is added there changes nothing but the condition.
    if (centred) level = trace / squares;
    if (ones) trace += ones_scale * squares;
    if (!ready && B <= kSpdOrder) small.emplace(B, K, scratch);
    for (int64_t i = 0; i < B; ++i) {
      // A row of weight zero has nothing to say, nor has one that is its own mean and is met;
      // without a penalty its pivot would be zero.
      const Acc before = (ready ? small->diagonal(i) : system[i * B + i]) +
                         static_cast<Acc>(level * root[i] * root[i]);
      bool silent = t == 0 && (root[i] == 0 || before == 0);
      for (int64_t k = 0; silent && k < K; ++k) silent = rhs[i * K + k] == 0;
      if (ready) {
        small->lift_row(i, level, root.data(), rhs + i * K);
      } else if (small) {
        small->fill_row(i, system + i * B, level, root.data(), rhs + i * K);
      } else {
        const Acc lift = static_cast<Acc>(level * root[i]);
        for (int64_t j = 0; level > 0 && j < B; ++j) {
          system[i * B + j] += lift * static_cast<Acc>(root[j]);
        }
      }
      (small ? small->diagonal(i) : system[i * B + i]) =
          before + static_cast<Acc>(silent ? 1.0 : t);
    }
    if (small) return small->solve(rhs, spread);  // the factor stays there
    const int64_t info = factor(system, B, spread);
    if (info == 0) potrs_lower(B, K, system, B, rhs, K);
    return info;
  };

  double spread = 0;
  int64_t info = 0;
  bool solved = false;
  const double right_norm = std::sqrt(sum_of_squares(q, B, K, K));
  T* alpha = q;
  const T* remainder = nullptr;  // q - system alpha, where alpha is inexact
  if (budget > 0) {
    std::vector<T> penalties(B, static_cast<T>(t));
    const SystemOperator<T> op{
        true,  half ? half : p, half ? D : p_stride, B, D, nullptr, ones ? root.data() : nullptr,
        false, ones_scale,      penalties.data(),    B};
    T* x = scratch.take<T>(B * K);
    solved = conjugate_gradient(op, q, x, K, budget, scratch);
    if (solved) {
      alpha = x;
      remainder = q;
      trace = sum_of_squares(op.p, B, D, op.stride);
      for (int64_t i = 0; ones && i < B; ++i) trace += ones_scale * root[i] * root[i];
    }
  }
  // W <- anchor + A^T PE
  auto set_weight = [&](const T* a, T* to) {
    if (anchor != to) std::memcpy(to, anchor, K * D * sizeof(T));
    gemm(true, false, K, D, B, T(1), a, K, pe, pe_stride, static_cast<T>(anchor_scale), to, D);
  };
  T* fresh = nullptr;  // the new weight, where it had to be known before
  if constexpr (std::is_same_v<T, float>) {
    if (!solved) {
      T* system = gram ? gram : scratch.take<T>(B * B);
      T* rhs = scratch.take<T>(B * K);
      std::memcpy(rhs, q, B * K * sizeof(T));
      info = solve.template operator()<T>(rhs, system, &spread);
      solved = info == 0 && trusted(spread, B);
      const double level = trace + t;
      if (info == 0 && !solved && !pb.lam_diag && in_range<T>(trace / B + t) &&
          kUnit<T> * level <= kTrustedResidual * t) {
        // alpha misses its right side by u |S| |A|, of which the head sees the part P^T S^-1, of
        // norm 1 / (2 t^1/2) at most.
        fresh = scratch.take<T>(K * D);
        set_weight(rhs, fresh);
        const double off = kUnit<T> * level * std::sqrt(sum_of_squares(rhs, B, K, K));
        solved = off <= 2 * std::sqrt(t) * kTrustedHead * std::sqrt(sum_of_squares(fresh, K, D, D));
        if (!solved) fresh = nullptr;
      }
      // A refinement step costs 2 B D K multiply-adds in float64, all in float64
      // B^2 D / 2 + B^3 / 6 + B^2 K.
      if (info == 0 && !solved &&
          8.0 * K * D < static_cast<double>(B) * D + B * B / 3.0 + 2.0 * B * K) {
        const RowOperator op{half ? half : p,
                             half ? D : p_stride,
                             B,
                             D,
                             ones ? root.data() : nullptr,
                             ones_scale,
                             t};
        if (auto& small = std::get<0>(kernels)) small->lower(system);
        solved = refine(op, system, q, rhs, K, scratch);
      }
      if (solved) alpha = rhs;
    }
  }
  double* system = nullptr;  // its factor in float64, where there is one
  if (!solved) {
    if constexpr (std::is_same_v<T, double>) system = gram;
    if (!system) system = scratch.take<double>(B * B);
    double* rhs = scratch.take<double>(B * K);
    for (int64_t i = 0; i < B * K; ++i) rhs[i] = q[i];
    info = solve.template operator()<double>(rhs, system, &spread);
    if (info != 0) return info;
    if (auto& small = std::get<1>(kernels)) small->lower(system);
    for (int64_t i = 0; i < B * K; ++i) q[i] = static_cast<T>(rhs[i]);
  }

  double loss = 0, pull = 0, heaviest = 1;
  for (int64_t i = 0; i < B; ++i) {
    double row = 0;
    for (int64_t j = i * K; j < (i + 1) * K; ++j) {
      const double residual = t * alpha[j] + (remainder ? remainder[j] : T(0));
      row += residual * residual;
    }
    loss += row;
    pull += row * root[i] * root[i];
    if (pb.sample) heaviest = std::max<double>(i == 0 ? 0 : heaviest, pb.sample[i]);
  }
  pb.loss = loss / pen.scale;
  if (!std::isfinite(pb.loss)) return -100;  // the caller finds out why; nothing was written yet

  // What rounding can do to the residual of the head: alpha solves its system up to about
  // u |S| |A|, A^T P is summed up to u |A| |P|, and the head is stored up to u |W|. And what
  // conjugate gradients have left of the right side.
  const double best = std::sqrt(loss), alpha_norm = std::sqrt(sum_of_squares(alpha, B, K, K));
  const double anchor_norm = anchor_scale * std::sqrt(sum_of_squares(anchor, K, D, D));
  if (right_norm > 0 && (!in_range<T>(trace / B + t) || alpha_norm < kLeastAlpha<T>)) {
    return kInaccurate;
  }
  double reach = trace, change_norm = std::sqrt(trace) * alpha_norm, bias_norm = 0;
  if (pb.lam_diag) {
    change_norm = std::sqrt(sum_of_squares(pe, B, D, pe_stride)) * alpha_norm;
    reach = sum_of_squares(p, B, D, p_stride);
  }
  const double total = total_of(pb);
  if (centred) reach += total * sum_of_squares(mean_phi.data(), 1, D, D);
  if (pb.bias) bias_norm += sum_of_squares(anchor_bias.data(), 1, K, K);
  if (centred) bias_norm += sum_of_squares(mean_q.data(), 1, K, K);
  const double product =
      std::sqrt(reach) * (anchor_norm + change_norm) + std::sqrt(total * bias_norm);
  const double left = remainder ? std::sqrt(sum_of_squares(remainder, B, K, K)) : 0;
  const double noise = kSums * kUnit<T> * (trace * alpha_norm + 2 * product + best) + left;
  const double worth = std::sqrt(pull / heaviest);
  if (shows(pb, noise, worth) || pb.rounds()) {
    T* weight = scratch.take<T>(K * D);
    T* residual = scratch.take<T>(B * K);
    T* delta = scratch.take<T>(B * K);
    std::vector<T> bias(pb.bias ? K : 0);
    const double size = targets_norm(pb);
    set_weight(alpha, weight);
    // How far the head is from the one that alpha promises: the residual by which t A misses its
    // own, and the penalty of a bias that was fitted to a weight gone wrong.
    auto missed = [&](bool is_settled) {
      double penalty = 0;
      for (int64_t k = 0; ones && k < K; ++k) {
        double sum = 0;
        for (int64_t i = 0; i < B; ++i) sum += static_cast<double>(root[i]) * alpha[i * K + k];
        const double promised = anchor_bias[k] + ones_scale * sum;
        if (!is_settled) bias[k] = static_cast<T>(promised);
        penalty += pen.t_bias * (bias[k] - promised) * (bias[k] - promised);
      }
      if (!is_settled) {
        residual_of<T>(pb, weight, ones ? bias.data() : nullptr, residual);
        if (centred) {
          Problem<T> exact = pb;
          exact.bias_dtype = kScalarType<T>;
          fit_bias(exact, pen, anchor_bias.data(), residual, bias.data());
        }
      }
      for (int64_t i = 0; i < B; ++i) {
        for (int64_t k = 0; k < K; ++k) {
          delta[i * K + k] = static_cast<T>(root[i] * residual[i * K + k] - t * alpha[i * K + k]);
        }
      }
      return std::sqrt(sum_of_squares(delta, B, K, K) + penalty);
    };
    bool good = tolerable(noise, best, size);
    if constexpr (std::is_same_v<T, double>) {
      // The head is refined by its own residual, which knows what was lost in A^T P: the change
      // (S^-1 (R - t A))^T P is small, and so are its rounding errors.
      double last = std::numeric_limits<double>::infinity();
      const bool refined = noise <= kSmallError * best;
      for (int step = 0; step < 8 && (!refined || pb.rounds()); ++step) {
        const double error = missed(false);
        good = tolerable(error, std::sqrt(weighted_squares(pb, residual)), size);
        if (refinement_ends(pb, step, error, best, last) || !system) break;
        last = error;
        potrs_lower(B, K, system, B, delta, K);
        for (int64_t i = 0; i < B * K; ++i) alpha[i] += delta[i];
        gemm(true, false, K, D, B, T(1), delta, K, pe, pe_stride, T(1), weight, D);
      }
    }
    const double weight_norm = std::sqrt(sum_of_squares(weight, K, D, D));
    const double error = kUnit<T> * (std::sqrt(reach) * weight_norm + size);
    // Rounded to half precision the residual may be smaller than before.
    settle(pb, pen, anchor_bias.data(), weight, bias.data(), residual,
           pb.rounds() ? std::numeric_limits<double>::infinity() : error / worth, scratch);
    if (std::is_same_v<T, float> && !pb.rounds()) {
      const double off = missed(true);
      good = tolerable(off, std::sqrt(weighted_squares(pb, residual)), size);
    }
    return good ? write_step(pb, pen, weight, bias.data(), residual) : kInaccurate;
  }

  if (fresh) {
    std::memcpy(pb.weight, fresh, K * D * sizeof(T));
  } else {
    set_weight(alpha, pb.weight);
  }
  for (int64_t k = 0; pb.bias && k < K; ++k) {
    double change = 0;
    if (ones) {
      for (int64_t i = 0; i < B; ++i) change += static_cast<double>(root[i]) * alpha[i * K + k];
      change *= ones_scale;
    } else {
      // A centred fit passes through the means: b = b_a + mean r0 - dW mean phi, dW = A^T PE.
      change = mean_q[k];
    }
    pb.bias[k] = static_cast<T>(anchor_bias[k] + change);
  }
  if (centred) {
    std::vector<double> projection(B, 0.0);
    for (int64_t i = 0; i < B; ++i) {
      for (int64_t j = 0; j < D; ++j) {
        projection[i] += static_cast<double>(pe[i * pe_stride + j]) * mean_phi[j];
      }
    }
    for (int64_t k = 0; k < K; ++k) {
      double change = 0;
      for (int64_t i = 0; i < B; ++i) change += projection[i] * alpha[i * K + k];
      pb.bias[k] = static_cast<T>(pb.bias[k] - change);
    }
  }
  // grad = -(2 / scale) root (t A) W_new
  if (pb.sample || remainder) {
    for (int64_t i = 0; i < B; ++i) {
      for (int64_t k = 0; k < K; ++k) {
        const T rest = remainder ? static_cast<T>(remainder[i * K + k] / t) : T(0);
        alpha[i * K + k] = root[i] * (alpha[i * K + k] + rest);
      }
    }
  }
  gemm(false, false, B, D, K, static_cast<T>(-2.0 * t / pen.scale), alpha, K, pb.weight, D, T(0),
       pb.grad, D);
  return 0;
}

// residual (n, K) = Y - [X 1] head for n rows from `begin` on, the head transposed: (order, K).
template <class T>
void fill_residual(const Problem<T>& pb, int64_t begin, int64_t n, const T* head, T* residual) {
  const int64_t D = pb.width, K = pb.targets;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = begin + i;
    for (int64_t k = 0; k < K; ++k) {
      const T y = pb.target ? pb.target[row * pb.target_stride + k] : T(0);
      residual[i * K + k] = pb.bias ? y - head[D * K + k] : y;
    }
    if (pb.labels) residual[i * K + pb.labels[row * pb.label_stride]] += T(1);
  }
  gemm(false, false, n, K, D, T(-1), pb.phi + begin * pb.phi_stride, pb.phi_stride, head, K, T(1),
       residual, K);
}

template <class T>
int64_t primal_step(Problem<T>& pb, const Penalties& pen, const std::vector<double>& t_diag) {
  const int64_t B = pb.rows, D = pb.width, K = pb.targets;
  const int64_t order =
      D + (pb.bias ? 1 : 0);  // the bias is the weight of a last feature that is 1
  Scratch scratch;
  const double rho = pen.t - pen.mu;
  auto penalty = [&](int64_t j) {
    if (j == D) return pb.free_bias ? 0.0 : pen.t_bias;
    return pb.lam_diag ? t_diag[j] : pen.t;
  };

  // The anchor with its bias, transposed: (order, K).
  T* anchor = scratch.take<T>(order * K);
  transpose(K, D, pb.weight, anchor);
  for (int64_t j = 0; rho > 0 && j < D; ++j) {
    const T shrink = static_cast<T>(ratio(penalty(j) - rho, penalty(j)));
    for (int64_t k = 0; k < K; ++k) anchor[j * K + k] *= shrink;
  }
  for (int64_t k = 0; pb.bias && k < K; ++k) {
    anchor[D * K + k] = pb.free_bias ? T(0) : static_cast<T>(pb.bias[k] * pen.shrink_bias);
  }

  // In float64 a bias is solved for at the mean m of the features, as c = b + W m: a large mean
  // takes no digits then. Its penalty is t_b |c - W m - b_a|^2.
  const T* solved_phi = pb.phi;
  int64_t solved_stride = pb.phi_stride;
  std::vector<double> mean;
  if (std::is_same_v<T, double> && pb.bias) {
    mean = mean_features(pb);
    T* copy = scratch.take<T>(B * D);
    for (int64_t i = 0; i < B; ++i) {
      for (int64_t j = 0; j < D; ++j) {
        copy[i * D + j] = static_cast<T>(pb.phi[i * pb.phi_stride + j] - mean[j]);
      }
    }
    solved_phi = copy;
    solved_stride = D;
  }
  auto unshift_head = [&](auto* values) {
    for (int64_t j = 0; j < static_cast<int64_t>(mean.size()); ++j) {
      for (int64_t k = 0; k < K; ++k) values[D * K + k] -= mean[j] * values[j * K + k];
    }
  };

  double trace = 0;  // of X^T S X
  auto solve = [&]<class Acc>(Acc* system, Acc* rhs, double* spread) -> int64_t {
    trace = 0;
    side_gram<T, Acc>(false, pb, solved_phi, solved_stride, pb.sample, pb.bias != nullptr, system,
                      rhs);
    // X^T S Y + t anchor gives the head itself: one product fewer than its change would cost.
    for (int64_t j = 0; j < order; ++j) {
      for (int64_t k = 0; k < K; ++k) {
        Acc pull = static_cast<Acc>(penalty(j)) * anchor[j * K + k];
        if (!mean.empty() && j < D) pull -= penalty(D) * mean[j] * anchor[D * K + k];
        rhs[j * K + k] += pull;
      }
    }
    for (int64_t j = 0; j < order; ++j) {
      trace += system[j * order + j];
      system[j * order + j] += static_cast<Acc>(penalty(j));
      for (int64_t i = 0; !mean.empty() && j < D && i < D; ++i) {
        system[i * order + j] += penalty(D) * mean[i] * mean[j];
      }
      if (!mean.empty() && j < D) system[D * order + j] -= penalty(D) * mean[j];
    }
    const int64_t info = factor(system, order, spread);
    if (info != 0) return info;
    potrs_lower(order, K, system, order, rhs, K);
    unshift_head(rhs);
    return 0;
  };

  double spread = 0;
  int64_t info = 0;
  bool solved = false;
  double head_error = 0;  // relative, of the direct solve
  double left = 0;        // by conjugate gradients: the root of what the objective can still gain
  T* head = scratch.take<T>(order * K);
  double least = penalty(0);
  for (int64_t j = 1; j < D; ++j) least = std::min(least, penalty(j));
  const int64_t budget = least > 0 ? cg_budget(pb.method, B, D, K) : 0;
  if (budget > 0) {
    std::vector<T> penalties(order);
    for (int64_t j = 0; j < order; ++j) penalties[j] = static_cast<T>(penalty(j));
    const SystemOperator<T> op{false, pb.phi,           pb.phi_stride, B,
                               D,     pb.sample,        nullptr,       pb.bias != nullptr,
                               0.0,   penalties.data(), order};
    // The right side from the residual at the anchor: X^T S (Y - X Wa).
    T* residual = scratch.take<T>(B * K);
    T* right = scratch.take<T>(order * K);
    fill_residual(pb, 0, B, anchor, residual);
    const double start = std::sqrt(weighted_squares(pb, residual));
    std::vector<double> sums(K, 0.0);
    for (int64_t i = 0; i < B; ++i) {
      const T s = pb.sample ? pb.sample[i] : T(1);
      for (int64_t k = 0; k < K; ++k) sums[k] += residual[i * K + k] *= s;
    }
    gemm(true, false, D, K, B, T(1), pb.phi, pb.phi_stride, residual, K, T(0), right, K);
    for (int64_t k = 0; pb.bias && k < K; ++k) right[D * K + k] = static_cast<T>(sums[k]);
    solved = conjugate_gradient(op, right, head, K, budget, scratch);
    for (int64_t i = 0; solved && i < order * K; ++i) head[i] += anchor[i];
    if (solved) {
      std::vector<T> diagonal(order);
      op.diagonal(diagonal.data());
      for (int64_t j = 0; j < order; ++j) trace += diagonal[j] - penalties[j];
      // They stop at a fraction of the right side, which a far anchor makes large. The objective
      // can gain r^T H^-1 r by the remainder r: with the bias eliminated, at most |r|^2 / min t.
      const double total = total_of(pb), whole = total + penalty(D);
      const std::vector<double> center = pb.bias ? mean_features(pb) : std::vector<double>(D, 0.0);
      double squares = 0;
      for (int64_t k = 0; pb.bias && k < K; ++k) {
        squares += static_cast<double>(right[D * K + k]) * right[D * K + k] / whole;
      }
      for (int64_t j = 0; j < D; ++j) {
        const double share = pb.bias ? center[j] * total / whole : 0.0;
        for (int64_t k = 0; k < K; ++k) {
          const double slope = right[j * K + k] - (pb.bias ? share * right[D * K + k] : 0.0);
          squares += slope * slope / least;
        }
      }
      // Twice, for the remainder has rounding errors of its size; and the right side X^T S R has
      // those of R, and of the sum.
      left = 2 * std::sqrt(squares) +
             kUnit<T> * std::sqrt(trace * sum_of_squares(anchor, order, K, K)) +
             kUnit<T> * std::sqrt(trace / least) * start;
    }
  }
  auto error_of = [&](double unit) {
    return unit * spread * spread * std::sqrt(static_cast<double>(order));
  };
  if (std::is_same_v<T, float> && !solved) {
    T* system = scratch.take<T>(order * order);
    info = solve.template operator()<T>(system, head, &spread);
    solved = info == 0 && trusted(spread, order) && in_range<T>(trace / order + least);
    head_error = error_of(kUnit<float>);
  }
  if (!solved && B == D) return info == 0 ? 1 : info;  // left to the dual side
  double* system = nullptr;                            // its factor in float64, where there is one
  if (!solved) {
    system = scratch.take<double>(order * order);
    double* rhs = scratch.take<double>(order * K);
    info = solve.template operator()<double>(system, rhs, &spread);
    if (info != 0) return info;
    for (int64_t i = 0; i < order * K; ++i) head[i] = static_cast<T>(rhs[i]);
    head_error = error_of(kUnit<double>);
  }
  if (!all_finite(head, order, K, K)) return -100;

  T* fresh = scratch.take<T>(K * D);
  transpose(D, K, head, fresh);
  // How far rounding can move the residual: by what the head lost, and by what X W^T loses.
  const double product = std::sqrt(std::max(trace, 0.0) * sum_of_squares(head, order, K, K));
  const double off = head_error * product + left;
  if constexpr (std::is_same_v<T, double>) {
    T* whole = scratch.take<T>(B * K);
    std::vector<T> bias(pb.bias ? K : 0);
    for (int64_t k = 0; pb.bias && k < K; ++k) bias[k] = head[D * K + k];
    residual_of<T>(pb, fresh, pb.bias ? bias.data() : nullptr, whole);
    double best = std::sqrt(weighted_squares(pb, whole));
    const bool refined = off <= kSmallError * best;
    if (!refined || pb.rounds()) {
      const double size = targets_norm(pb);
      T* change = scratch.take<T>(order * K);
      bool good = tolerable(off, best, size);
      double last = std::numeric_limits<double>::infinity();
      for (int step = 0; step < 8 && (!refined || pb.rounds()) && system; ++step) {
        // The change H^-1 (X^T S R - t (W - Wa)) by which the head is refined, and what it gains.
        std::vector<double> sums(K, 0.0);
        for (int64_t i = 0; i < B; ++i) {
          for (int64_t k = 0; k < K; ++k) sums[k] += whole[i * K + k] *= pb.sample_of(i);
        }
        gemm(true, false, D, K, B, T(1), solved_phi, solved_stride, whole, K, T(0), change, K);
        for (int64_t k = 0; pb.bias && k < K; ++k) change[D * K + k] = sums[k];
        for (int64_t j = 0; j < order; ++j) {
          for (int64_t k = 0; k < K; ++k) {
            change[j * K + k] -= penalty(j) * (head[j * K + k] - anchor[j * K + k]);
            if (j < static_cast<int64_t>(mean.size())) {
              change[j * K + k] += mean[j] * penalty(D) * (head[D * K + k] - anchor[D * K + k]);
            }
          }
        }
        const std::vector<double> slope(change, change + order * K);
        potrs_lower(order, K, system, order, change, K);
        double gain = 0;
        for (int64_t i = 0; i < order * K; ++i) gain += slope[i] * change[i];
        unshift_head(change);
        const double error = std::sqrt(std::abs(gain));
        good = tolerable(error, best, size);
        if (refinement_ends(pb, step, error, best, last)) break;
        last = error;
        for (int64_t i = 0; i < order * K; ++i) head[i] += change[i];
        transpose(D, K, head, fresh);
        for (int64_t k = 0; pb.bias && k < K; ++k) bias[k] = head[D * K + k];
        residual_of<T>(pb, fresh, pb.bias ? bias.data() : nullptr, whole);
        best = std::sqrt(weighted_squares(pb, whole));
      }
      if (!good) return kInaccurate;
      settle(pb, pen, anchor + D * K, fresh, bias.data(), whole, 0, scratch);
      return write_step(pb, pen, fresh, bias.data(), whole);
    }
  } else if (pb.rounds()) {
    T* whole = scratch.take<T>(B * K);
    std::vector<T> bias(pb.bias ? K : 0);
    settle(pb, pen, anchor + D * K, fresh, bias.data(), whole,
           std::numeric_limits<double>::infinity(), scratch);
    const double own = std::sqrt(weighted_squares(pb, whole));
    if (!tolerable(off, own, targets_norm(pb))) return kInaccurate;
    return write_step(pb, pen, fresh, bias.data(), whole);
  }
  // Residual and gradient a block of rows at a time, so that the residual stays in the cache.
  constexpr int64_t kBlock = 256;
  T* residual = scratch.take<T>(std::min(B, kBlock) * K);
  double loss = 0, pull = 0, heaviest = 0;
  for (int64_t begin = 0; begin < B; begin += kBlock) {
    const int64_t n = std::min(kBlock, B - begin);
    fill_residual(pb, begin, n, head, residual);
    for (int64_t i = 0; i < n; ++i) {
      const T s = pb.sample ? pb.sample[begin + i] : T(1);
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) {
        sum += static_cast<double>(residual[i * K + k]) * residual[i * K + k];
        residual[i * K + k] *= s;
      }
      loss += s * sum;
      pull += s * s * sum;
      heaviest = std::max<double>(heaviest, s);
    }
    gemm(false, false, n, D, K, static_cast<T>(-2.0 / pen.scale), residual, K, fresh, D, T(0),
         pb.grad + begin * D, D);
  }
  pb.loss = loss / pen.scale;
  if (!std::isfinite(pb.loss)) return -100;
  if constexpr (std::is_same_v<T, float>) {
    const double own = std::sqrt(loss);
    if (!tolerable(off, own, 0) && !tolerable(off, own, targets_norm(pb))) return kInaccurate;
    const double worth = std::sqrt(pull / heaviest);
    const double noise = kUnit<T> * (2 * product + own);
    if (shows(pb, noise, worth)) {
      // Once more, in float64.
      T* whole = scratch.take<T>(B * K);
      std::vector<T> bias(pb.bias ? K : 0);
      settle(pb, pen, anchor + D * K, fresh, bias.data(), whole,
             std::numeric_limits<double>::infinity(), scratch);
      return write_step(pb, pen, fresh, bias.data(), whole);
    }
  }
  std::memcpy(pb.weight, fresh, K * D * sizeof(T));
  for (int64_t k = 0; pb.bias && k < K; ++k) pb.bias[k] = head[D * K + k];
  return 0;
}

// Why the arithmetic came out NaN or Inf, in the order in which the fallback reports it.
template <class T>
int32_t diagnose(const Problem<T>& pb) {
  if (!all_finite(pb.phi, pb.rows, pb.width, pb.phi_stride)) return kBadFeatures;
  if (pb.target && !all_finite(pb.target, pb.rows, pb.targets, pb.target_stride)) return kBadTarget;
  if (!all_finite(pb.weight, pb.targets, pb.width, pb.width)) return kBadWeight;
  if (pb.bias && !all_finite(pb.bias, 1, pb.targets, pb.targets)) return kBadWeight;
  return 1;  // finite data that overflow: no leading minor can be trusted
}

// The side that a problem is solved on.
template <class T>
int64_t solve(Problem<T>& pb, const Penalties& pen, const std::vector<double>& t_diag) {
  // A square problem costs less on the primal side, but with a bias that has an unknown more than
  // there are rows: where the penalty does not resolve it well, as in large ones, the dual side has
  // to.
  const bool square = pb.rows == pb.width && pb.width <= 2048 && std::is_same_v<T, float>;
  int64_t info = -1;
  if (pb.rows > pb.width || square) info = primal_step(pb, pen, t_diag);
  if (pb.rows <= pb.width && info != 0) info = dual_step(pb, pen, t_diag);
  return info;
}

// The float32 problem in float64; the head is still rounded to what it is stored in.
int64_t solve_in_float64(Problem<float>& pb, const Penalties& pen,
                         const std::vector<double>& t_diag) {
  const int64_t B = pb.rows, D = pb.width, K = pb.targets;
  auto widened = [](const float* from, int64_t rows, int64_t cols, int64_t stride) {
    std::vector<double> to(from ? rows * cols : 0);
    for (int64_t i = 0; from && i < rows; ++i) {
      std::copy_n(from + i * stride, cols, to.data() + i * cols);
    }
    return to;
  };
  std::vector<double> phi = widened(pb.phi, B, D, pb.phi_stride), grad(B * D);
  std::vector<double> target = widened(pb.target, B, K, pb.target_stride);
  std::vector<double> weight = widened(pb.weight, K, D, D), bias = widened(pb.bias, 1, K, K);
  std::vector<double> sample = widened(pb.sample, 1, B, B);
  auto pointer = [](std::vector<double>& values, const void* given) {
    return given ? values.data() : nullptr;
  };
  Problem<double> wide{};
  wide.rows = B;
  wide.width = D;
  wide.targets = K;
  wide.phi = phi.data();
  wide.phi_stride = D;
  wide.target = pointer(target, pb.target);
  wide.target_stride = K;
  wide.labels = pb.labels;
  wide.label_stride = pb.label_stride;
  wide.weight = weight.data();
  wide.bias = pointer(bias, pb.bias);
  wide.sample = pointer(sample, pb.sample);
  wide.lam_diag = pb.lam_diag;
  wide.lam = pb.lam;
  wide.ridge = pb.ridge;
  wide.mean = pb.mean;
  wide.free_bias = pb.free_bias;
  wide.method = kCholesky;
  wide.weight_dtype = pb.weight_dtype;
  wide.bias_dtype = pb.bias_dtype;
  wide.grad = grad.data();
  const int64_t info = solve(wide, pen, t_diag);
  if (info != 0) return info;
  pb.loss = wide.loss;
  std::copy(grad.begin(), grad.end(), pb.grad);
  std::copy(weight.begin(), weight.end(), pb.weight);
  std::copy(bias.begin(), bias.end(), pb.bias);
  return 0;
}

bool bad_penalty(double value) { return !(value >= 0) || !std::isfinite(value); }

// One step; returns info. On failure nothing but pb.loss and pb.grad is written.
template <class T>
int32_t step(Problem<T>& pb) {
  const int64_t D = pb.width;
  double total = static_cast<double>(pb.rows);
  bool bad_sample = false;
  if (pb.sample) {
    total = 0;
    for (int64_t i = 0; i < pb.rows; ++i) {
      bad_sample |= bad_penalty(pb.sample[i]);
      total += pb.sample[i];
    }
  }
  Penalties pen{};
  pen.scale = pb.mean ? total : 1.0;
  pen.mu = pen.scale * pb.lam;
  pen.t = pen.t_bias = pen.mu + pen.scale * pb.ridge;
  pen.shrink = pen.shrink_bias = ratio(pen.mu, pen.t);

  auto fail = [&](int32_t code) {
    std::fill_n(pb.grad, pb.rows * D, T(0));
    pb.loss = code == 0 ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    return code;
  };
  if (bad_penalty(pb.lam) || bad_penalty(pb.ridge)) return fail(kBadPenalty);
  std::vector<double> t_diag;
  if (pb.lam_diag) {
    t_diag.resize(D);
    const double scale = total == 0 && pb.mean ? 1.0 : pen.scale;
    for (int64_t j = 0; j < D; ++j) {
      const double unit = pb.lam + pb.ridge + pb.lam_diag[j];
      if (bad_penalty(pb.lam_diag[j]) || !(unit > 0)) return fail(kBadPenalty);
      t_diag[j] = scale * unit;
    }
    if (pb.bias && !pb.free_bias && !(pb.lam + pb.ridge > 0)) return fail(kBadPenalty);
  }
  if (bad_sample) return fail(kBadSampleWeight);
  if (pb.labels) {
    for (int64_t i = 0; i < pb.rows; ++i) {
      const int64_t label = pb.labels[i * pb.label_stride];
      if (label < 0 || label >= pb.targets) {
        return fail(all_finite(pb.phi, pb.rows, D, pb.phi_stride) ? kBadTarget : kBadFeatures);
      }
    }
  }
  if (total == 0) {  // no data: not a step
    const int32_t code = diagnose(pb);
    return fail(code == 1 ? 0 : code);
  }

  int64_t info = solve(pb, pen, t_diag);
  if (info == 0) return 0;
  const int32_t cause = diagnose(pb);
  if (cause != 1) return fail(cause);
  if constexpr (std::is_same_v<T, float>) {
    info = solve_in_float64(pb, pen, t_diag);
  } else if (info == kInaccurate && pb.method != kCholesky) {
    pb.method = kCholesky;
    info = solve(pb, pen, t_diag);
  }
  if (info == 0) return 0;
  // What no factorisation resolves is singular within rounding.
  if (info == kInaccurate) info = std::min(pb.rows, D);
  return fail(info < 0 ? 1 : static_cast<int32_t>(info));
}

// --- from tensors
// ------------------------------------------------------------------------------------

double read_scalar(const Tensor& tensor, const Batched& batched, int64_t index) {
  const int64_t at = tensor.dim() == 0 ? 0 : index;
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return *batched.at<double>(at);
    case ScalarType::Float:
      return *batched.at<float>(at);
    case ScalarType::Half:
      return *batched.at<torch::headeronly::Half>(at);
    default:
      return *batched.at<torch::headeronly::BFloat16>(at);
  }
}

// `tensor` in `dtype` with rows contiguous within themselves: as it is wherever that is so already.
Tensor prepared(const Tensor& tensor, ScalarType dtype, int64_t core, bool packed) {
  Tensor result = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  const int64_t ndim = result.dim();
  const bool unit = result.size(ndim - 1) <= 1 || result.stride(ndim - 1) == 1;
  bool rows = true;
  if (core == 2 && result.size(ndim - 2) > 1) {
    const int64_t stride = result.stride(ndim - 2), cols = result.size(ndim - 1);
    rows = packed ? stride == cols : stride >= cols;
  }
  return unit && rows ? result : torch::stable::contiguous(result);
}

// Row weights in T: as they are, or in `held`. Of a mean only their ratios count: the largest
// becomes about 1 where it is so far from that that products with it could leave the range of T.
template <class T, class S>
const T* row_weights(const S* given, int64_t rows, bool mean, std::vector<T>& held) {
  double largest = 0;
  for (int64_t i = 0; i < rows; ++i) largest = std::max<double>(largest, given[i]);
  const bool far =
      mean && std::isfinite(largest) && largest > 0 && std::abs(std::ilogb(largest)) > 40;
  if constexpr (std::is_same_v<S, T>) {
    if (!far) return given;
  }
  const int power = far ? -std::ilogb(largest) : 0;
  held.resize(rows);
  for (int64_t i = 0; i < rows; ++i) {  // what is negative stays so
    held[i] =
        given[i] < 0 ? T(-1) : static_cast<T>(std::ldexp(static_cast<double>(given[i]), power));
  }
  return held.data();
}

// What the weight and the bias are rounded to.
struct Stored {
  ScalarType weight, bias;
};

template <class T>
void run(const Tensor& features, const Tensor& target, const Tensor& weight,
         const std::optional<Tensor>& bias, const Tensor& lam, const std::optional<Tensor>& ridge,
         const std::optional<Tensor>& lam_diag, const std::optional<Tensor>& sample_weight,
         Options options, Stored head, const Tensor& loss, const Tensor& grad, const Tensor& info) {
  constexpr ScalarType kType = kScalarType<T>;
  const int64_t ndim = features.dim();
  Problem<T> base{};
  base.rows = features.size(ndim - 2);
  base.width = features.size(ndim - 1);
  base.targets = weight.size(weight.dim() - 2);
  base.mean = options.reduction == kMean;
  base.method = options.method;
  base.free_bias = options.fit_bias == kFree;
  base.weight_dtype = head.weight;
  base.bias_dtype = head.bias;
  const Tensor phi = prepared(features, kType, 2, false);
  base.phi_stride = base.rows > 1 ? std::max(phi.stride(ndim - 2), base.width) : base.width;
  const bool classes = target.scalar_type() == ScalarType::Long;
  const Tensor y = classes ? target : prepared(target, kType, 2, false);
  if (classes) {
    base.label_stride = y.stride(y.dim() - 1);
  } else {
    base.target_stride =
        base.rows > 1 ? std::max(y.stride(y.dim() - 2), base.targets) : base.targets;
  }
  std::optional<Tensor> sample, diag;
  const bool wide_sample = sample_weight && sample_weight->scalar_type() == ScalarType::Double &&
                           kType != ScalarType::Double;
  if (sample_weight) {
    sample = prepared(*sample_weight, wide_sample ? ScalarType::Double : kType, 1, true);
  }
  if (lam_diag) diag = prepared(*lam_diag, ScalarType::Double, 1, true);
  std::vector<T> scaled;
  const Batched phis(phi, 2), ys(y, classes ? 1 : 2), weights(weight, 2), lams(lam, 0),
      grads(grad, 2);
  const Batched biases = bias ? Batched(*bias, 1) : Batched();
  const Batched ridges = ridge ? Batched(*ridge, 0) : Batched();
  const Batched samples = sample ? Batched(*sample, 1) : Batched();
  const Batched diags = diag ? Batched(*diag, 1) : Batched();
  const int64_t batches = product(batch_shape(features, 2));
  for (int64_t i = 0; i < batches; ++i) {
    Problem<T> pb = base;
    pb.phi = phis.at<T>(i);
    (classes ? void(pb.labels = ys.at<int64_t>(i)) : void(pb.target = ys.at<T>(i)));
    pb.weight = weights.at<T>(i);
    if (bias) pb.bias = biases.at<T>(i);
    if (sample) {
      pb.sample = wide_sample ? row_weights(samples.at<double>(i), base.rows, base.mean, scaled)
                              : row_weights(samples.at<T>(i), base.rows, base.mean, scaled);
    }
    if (diag) pb.lam_diag = diags.at<double>(i);
    pb.lam = read_scalar(lam, lams, i);
    pb.ridge = ridge ? read_scalar(*ridge, ridges, i) : 0.0;
    pb.grad = grads.at<T>(i);
    static_cast<int32_t*>(info.data_ptr())[i] = step(pb);
    static_cast<T*>(loss.data_ptr())[i] = static_cast<T>(pb.loss);
  }
}

ScalarType wider(ScalarType a, ScalarType b) {
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double
                                                            : ScalarType::Float;
}

// Of the arithmetic: float32 where it narrows nothing of the head and its features.
ScalarType compute_dtype(const Tensor& features, const Stored& head) {
  return wider(features.scalar_type(), wider(head.weight, head.bias));
}

Tensor like(const Tensor& tensor, ScalarType dtype) {
  return empty_cpu(batch_shape(tensor, 0), dtype);
}

Stored stored_dtypes(const Tensor& weight, const std::optional<Tensor>& bias) {
  return {weight.scalar_type(), bias ? bias->scalar_type() : weight.scalar_type()};
}

using InPlace = std::tuple<Tensor, Tensor, Tensor>;

// `weight` and `bias` are contiguous, of the compute dtype, and updated in place.
InPlace step_on(const Tensor& features, const Tensor& target, const Tensor& weight,
                const std::optional<Tensor>& bias, const Tensor& lam,
                const std::optional<Tensor>& ridge, const std::optional<Tensor>& lam_diag,
                const std::optional<Tensor>& sample_weight, Options options, Stored head) {
  const ScalarType dtype = weight.scalar_type();
  Tensor loss = empty_cpu(batch_shape(features, 2), dtype);
  Tensor grad = like(features, dtype);
  Tensor info = empty_cpu(batch_shape(features, 2), ScalarType::Int);
  auto go = dtype == ScalarType::Double ? &run<double> : &run<float>;
  go(features, target, weight, bias, lam, ridge, lam_diag, sample_weight, options, head, loss, grad,
     info);
  if (features.scalar_type() != dtype) grad = torch::stable::to(grad, features.scalar_type());
  const ScalarType loss_dtype = wider(features.scalar_type(), head.weight);
  if (loss_dtype != dtype) loss = torch::stable::to(loss, loss_dtype);
  return {loss, grad, info};
}

// A contiguous copy in the compute dtype.
Tensor working_copy(const Tensor& tensor, ScalarType dtype) {
  Tensor copy = like(tensor, dtype);
  torch::stable::copy_(copy, tensor);
  return copy;
}

Options checked(const char* op, bool in_place, const Tensor& features, const Tensor& target,
                const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& lam,
                const std::optional<Tensor>& ridge, const std::optional<Tensor>& lam_diag,
                const std::optional<Tensor>& sample_weight, int64_t reduction, int64_t fit_bias,
                int64_t method) {
  Checked check(op);
  Size B{"B"}, D{"D"}, K{"K"};
  check.tensor("features", features, kFloats, {B, D});
  if (in_place) {
    check.written("weight", weight, kFloats, {K, D});
    check.written("bias", bias, kFloats, {K});
  } else {
    check.tensor("weight", weight, kFloats, {K, D});
    check.tensor("bias", bias, kFloats, {K});
  }
  if (dtype_of(target).codes == kInt64.codes) {
    check.tensor("target", target, kInt64, {B});
  } else {
    check.tensor("target", target, kFloats | kInt64, {B, K});
  }
  check.scalar("lam", lam, kFloats);
  check.scalar("ridge", ridge, kFloats);
  check.tensor("lam_diag", lam_diag, kFloats, {D});
  check.tensor("sample_weight", sample_weight, kFloats, {B});
  check.integer("reduction", reduction, kMean, kSum);
  check.integer("fit_bias", fit_bias, kPenalized, kFree);
  check.integer("method", method, kAuto, kConjugateGradients);
  if (in_place) check.apart();
  return {Reduction(reduction), BiasFit(fit_bias), Method(method)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> proximal_step(
    const Tensor& features, const Tensor& target, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& lam, const std::optional<Tensor>& ridge,
    const std::optional<Tensor>& lam_diag, const std::optional<Tensor>& sample_weight,
    int64_t reduction, int64_t fit_bias, int64_t method) {
  const Options options = checked("proximal_step", false, features, target, weight, bias, lam,
                                  ridge, lam_diag, sample_weight, reduction, fit_bias, method);
  const Stored head = stored_dtypes(weight, bias);
  const ScalarType dtype = compute_dtype(features, head);
  Tensor new_weight = working_copy(weight, dtype);
  std::optional<Tensor> new_bias;
  if (bias) new_bias = working_copy(*bias, dtype);
  auto [loss, grad, info] = step_on(features, target, new_weight, new_bias, lam, ridge, lam_diag,
                                    sample_weight, options, head);
  if (weight.scalar_type() != dtype)
    new_weight = torch::stable::to(new_weight, weight.scalar_type());
  if (bias && bias->scalar_type() != dtype)
    new_bias = torch::stable::to(*new_bias, bias->scalar_type());
  if (!bias) new_bias = empty_cpu(batch_shape(features, 2, {0}), weight.scalar_type());
  return {new_weight, *new_bias, loss, grad, info};
}

InPlace proximal_step_(const Tensor& features, const Tensor& target, const Tensor& weight,
                       const std::optional<Tensor>& bias, const Tensor& lam,
                       const std::optional<Tensor>& ridge, const std::optional<Tensor>& lam_diag,
                       const std::optional<Tensor>& sample_weight, int64_t reduction,
                       int64_t fit_bias, int64_t method) {
  const Options options = checked("proximal_step_", true, features, target, weight, bias, lam,
                                  ridge, lam_diag, sample_weight, reduction, fit_bias, method);
  const Stored head = stored_dtypes(weight, bias);
  const ScalarType dtype = compute_dtype(features, head);
  auto direct = [&](const Tensor& t) { return t.scalar_type() == dtype && t.is_contiguous(); };
  if (direct(weight) && (!bias || direct(*bias))) {
    return step_on(features, target, weight, bias, lam, ridge, lam_diag, sample_weight, options,
                   head);
  }
  Tensor new_weight = working_copy(weight, dtype);
  std::optional<Tensor> new_bias;
  if (bias) new_bias = working_copy(*bias, dtype);
  auto result = step_on(features, target, new_weight, new_bias, lam, ridge, lam_diag, sample_weight,
                        options, head);
  Tensor out = weight;
  torch::stable::copy_(out, new_weight);
  if (bias) {
    Tensor out_bias = *bias;
    torch::stable::copy_(out_bias, *new_bias);
  }
  return result;
}

}  // namespace
}  // namespace cfl::cpu

STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CPU, m) {
  if (!cfl::cpu::blas_available()) return;  // the Python fallback serves instead
  m.impl("proximal_step", TORCH_BOX(&cfl::cpu::proximal_step));
  m.impl("proximal_step_", TORCH_BOX(&cfl::cpu::proximal_step_));
}
