// tall_gram, tall_factor and narrow_ridge on the CPU: from tensors to the kernel of tall_gram.h, a
// run of rows to a thread, and the small dense algebra that lstsq, pinv and ridge do on its result.
// Semantics: python/cfl_ops/ops/solve/tall.py and narrow_ridge.py (the fallbacks).

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
#include "cpu/tall_gram.h"
#include "cpu/tensor.h"

namespace cfl::cpu {
namespace {

using detail::TallGram;
using detail::TallGramKernel;

constexpr int64_t kRowsPerPart = 2048;

const TallGramKernel& kernel() {
  switch (isa()) {
#if defined(CFL_HAVE_X86_ISAS)
    case Isa::kAmx:
    case Isa::kAvx512:
      return *detail::tall_gram_avx512();
    case Isa::kAvx2:
      return *detail::tall_gram_avx2();
#endif
    default:
      return *detail::tall_gram_generic();
  }
}

void* scratch(size_t bytes) {
  thread_local KeptMemory memory;
  return memory.get<char>(bytes);
}

// A run of rows to each thread.
void sum_rows(const TallGram& args, int64_t rows, bool parallel) {
  const TallGramKernel& k = kernel();
  const size_t bytes = k.scratch_bytes(args.s, args.k);
  const int64_t numbers = args.s * (args.s + args.k);
  if (!parallel || rows <= 2 * kRowsPerPart || torch::stable::get_num_threads() == 1) {
    k.run(&args, 0, rows, scratch(bytes));
    return;
  }
  const int64_t parts = std::min<int64_t>(torch::stable::get_num_threads(), rows / kRowsPerPart);
  std::vector<double> sums(static_cast<size_t>(parts * numbers));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      TallGram mine = args;
      mine.gram = sums.data() + part * numbers;
      mine.cross = mine.gram + args.s * args.s;
      k.run(&mine, rows * part / parts, rows * (part + 1) / parts, scratch(bytes));
    }
  });
  for (int64_t i = 0; i < numbers; ++i) {
    double total = 0;
    for (int64_t part = 0; part < parts; ++part) total += sums[part * numbers + i];
    (i < args.s * args.s ? args.gram[i] : args.cross[i - args.s * args.s]) = total;
  }
}

// The tensors of a batch of tall matrices, converted where need be.
struct Inputs {
  Tensor t;
  std::optional<Tensor> b, w;
  TallGram args;
  Batched ts, bs, ws;
  int64_t rows, batch;

  Inputs(const Tensor& t_in, const std::optional<Tensor>& b_in, const std::optional<Tensor>& w_in)
      : t(t_in) {
    const auto is_wide = [](const Tensor& tensor) {
      return tensor.scalar_type() == ScalarType::Double;
    };
    const bool wide = is_wide(t) || (b_in && is_wide(*b_in));
    const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
    if (t.scalar_type() != dtype) t = torch::stable::to(t, dtype);
    const int64_t ndim = t.dim();
    rows = t.size(ndim - 2);
    batch = product(batch_shape(t, 2));
    args.s = t.size(ndim - 1);
    args.wide = wide;
    args.t_row_stride = t.stride(ndim - 2);
    args.t_col_stride = t.stride(ndim - 1);
    ts = Batched(t, 2);
    if (b_in) {
      b = b_in->scalar_type() == t.scalar_type() ? *b_in
                                                 : torch::stable::to(*b_in, t.scalar_type());
      args.k = b->size(b->dim() - 1);
      args.b_row_stride = b->stride(b->dim() - 2);
      args.b_col_stride = b->stride(b->dim() - 1);
      bs = Batched(*b, 2);
    }
    if (w_in) {
      w = torch::stable::contiguous(*w_in);
      ws = Batched(*w, 2);
    }
  }

  TallGram of(int64_t index) const {
    TallGram mine = args;
    mine.t = ts.at(index);
    if (b) mine.b = bs.at(index);
    if (w) mine.w = ws.at<double>(index);
    return mine;
  }

  template <class Function>
  void for_each(const Function& one) const {  // one(index, whether it has the threads to itself)
    if (batch == 1) {
      one(0, true);
    } else {
      torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) one(i, false);
      });
    }
  }
};

std::tuple<Tensor, Tensor> tall_gram(const Tensor& t, const std::optional<Tensor>& b,
                                     const std::optional<Tensor>& w) {
  Checked check("tall_gram");
  Size m{"m"}, order{"s"}, k_size{"k"};
  check.tensor("t", t, kFloats, {m, order});
  check.tensor("b", b, kFloats, {m, k_size});
  check.tensor("w", w, kFloat64, {order, order});
  const Inputs in(t, b, w);
  const int64_t s = in.args.s, k = in.args.k;
  Tensor gram = empty_cpu(batch_shape(t, 2, {s, s}), ScalarType::Double);
  Tensor cross = empty_cpu(batch_shape(t, 2, {s, k}), ScalarType::Double);
  in.for_each([&](int64_t index, bool parallel) {
    TallGram mine = in.of(index);
    mine.gram = static_cast<double*>(gram.data_ptr()) + index * s * s;
    mine.cross = static_cast<double*>(cross.data_ptr()) + index * s * k;
    sum_rows(mine, in.rows, parallel);
  });
  return {gram, cross};
}

// --- tall_factor
// --------------------------------------------------------------------------------------

// The inverse of the lower triangular Cholesky factor of a (s x s), zeros above; false where a
// pivot is lost. a is overwritten.
bool inverse_factor(int64_t s, double* a, double* inverse) {
  std::vector<double> diagonal(static_cast<size_t>(s));
  for (int64_t i = 0; i < s; ++i) diagonal[i] = a[i * s + i];
  if (potrf_lower(s, a, s) != 0) return false;
  const double floor = static_cast<double>(s) * std::numeric_limits<double>::epsilon();
  for (int64_t i = 0; i < s; ++i) {
    const double pivot = a[i * s + i];
    if (!(pivot * pivot > floor * diagonal[i])) return false;
  }
  std::fill_n(inverse, s * s, 0.0);
  for (int64_t i = 0; i < s; ++i) {
    double* row = inverse + i * s;
    for (int64_t k = 0; k < i; ++k) {
      const double factor = -a[i * s + k];
      for (int64_t j = 0; j <= k; ++j) row[j] += factor * inverse[k * s + j];
    }
    row[i] = 1.0;
    for (int64_t j = 0; j <= i; ++j) row[j] /= a[i * s + i];
  }
  return true;
}

// Removes from the rows of `vectors` (count x s) what lies in the span of the rows of `null` (q x
// s), which are made orthonormal.
void project_out(int64_t s, double* null, int64_t q, double* vectors, int64_t count) {
  auto remove = [&](double* from, const double* unit) {
    double dot = 0;
    for (int64_t i = 0; i < s; ++i) dot += from[i] * unit[i];
    for (int64_t i = 0; i < s; ++i) from[i] -= dot * unit[i];
  };
  for (int64_t i = 0; i < q; ++i) {
    double* row = null + i * s;
    for (int pass = 0; pass < 3; ++pass) {  // normalise, then orthogonalise twice
      double largest = 0, square = 0;
      for (int64_t j = 0; j < s; ++j) largest = std::max(largest, std::abs(row[j]));
      if (!(largest > 0)) break;
      for (int64_t j = 0; j < s; ++j) row[j] /= largest, square += row[j] * row[j];
      for (int64_t j = 0; j < s; ++j) row[j] /= std::sqrt(square);
      for (int64_t before = 0; pass < 2 && before < i; ++before) remove(row, null + before * s);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t j = 0; j < q; ++j) remove(vectors + i * s, null + j * s);
    }
  }
}

// left (s x s) and right of the pseudoinverse right left^T T^T, from the float64 Gram; returns the
// rank, or -1 where the Gram is not finite. Mathematics: _factors and _second_pass of the fallback.
int64_t factor(const Inputs& in, int64_t index, bool parallel, const double* gram, double* left,
               double* right, double well_conditioned, double shift, double kept) {
  const int64_t s = in.args.s;
  const auto size = static_cast<size_t>(s * s);
  std::vector<double> scale(static_cast<size_t>(s)), system(size), inverse(size);
  auto equilibrate = [&](double extra) {
    for (int64_t i = 0; i < s; ++i) {
      for (int64_t j = 0; j < s; ++j) system[i * s + j] = gram[i * s + j] / (scale[i] * scale[j]);
      system[i * s + i] += extra;
    }
  };
  for (int64_t i = 0; i < s; ++i) {
    const double square = gram[i * s + i];
    if (!std::isfinite(square)) {
      std::fill_n(left, s * s, 0.0);
      std::fill_n(right, s * s, 0.0);
      return -1;
    }
    scale[i] = square > 0 ? std::sqrt(square) : 1.0;
  }
  equilibrate(0.0);
  if (inverse_factor(s, system.data(), inverse.data())) {
    double trace = 0;
    for (double value : inverse) trace += value * value;
    if (trace <= well_conditioned) {
      gemm(true, false, s, s, s, 1.0, inverse.data(), s, inverse.data(), s, 0.0, left, s);
      std::fill_n(right, s * s, 0.0);
      for (int64_t i = 0; i < s; ++i) {
        right[i * s + i] = 1.0;
        for (int64_t j = 0; j < s; ++j) left[i * s + j] /= scale[i] * scale[j];
      }
      return s;
    }
  }

  equilibrate(shift);
  if (!inverse_factor(s, system.data(), inverse.data()))
    return -1;                          // cannot be: shift is above rounding
  std::vector<double>& first = system;  // D^-1 L^-T
  for (int64_t i = 0; i < s; ++i) {
    for (int64_t j = 0; j < s; ++j) first[i * s + j] = inverse[j * s + i] / scale[i];
  }
  std::vector<double> second(size), values(static_cast<size_t>(s)), rotated(size);
  TallGram args = in.of(index);
  args.k = 0;
  args.w = first.data();
  args.gram = second.data();
  sum_rows(args, in.rows, parallel);
  if (eigh(s, second.data(), values.data()) != 0) return -1;
  // Row i of `rotated` is D^-1 L^-T v_i; eigenvalues rise, so the null vectors come first.
  gemm(false, true, s, s, s, 1.0, second.data(), s, first.data(), s, 0.0, rotated.data(), s);
  const int64_t lost = std::upper_bound(values.begin(), values.end(), kept,
                                        [](double limit, double value) { return value >= limit; }) -
                       values.begin();
  std::fill_n(left, s * s, 0.0);
  for (int64_t i = lost; i < s; ++i) {
    const double factor = 1.0 / std::sqrt(values[i]);
    for (int64_t j = 0; j < s; ++j) left[j * s + i] = rotated[i * s + j] *= factor;
  }
  project_out(s, rotated.data(), lost, rotated.data() + lost * s, s - lost);
  for (int64_t i = 0; i < s; ++i) {
    for (int64_t j = 0; j < s; ++j) right[j * s + i] = i < lost ? 0.0 : rotated[i * s + j];
  }
  return s - lost;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tall_factor(const Tensor& t,
                                                               const std::optional<Tensor>& b,
                                                               double well_conditioned,
                                                               double shift, double kept) {
  Checked check("tall_factor");
  Size m{"m"}, order{"s"}, k_size{"k"};
  check.tensor("t", t, kFloats, {m, order});
  check.tensor("b", b, kFloats, {m, k_size});
  check.number("well_conditioned", well_conditioned, 0);
  check.number("shift", shift, 0);
  check.number("kept", kept, 0);
  const Inputs in(t, b, std::nullopt);
  const int64_t s = in.args.s, k = in.args.k;
  Tensor left = empty_cpu(batch_shape(t, 2, {s, s}), ScalarType::Double);
  Tensor right = empty_cpu(batch_shape(t, 2, {s, s}), ScalarType::Double);
  Tensor cross = empty_cpu(batch_shape(t, 2, {s, k}), ScalarType::Double);
  Tensor rank = empty_cpu(batch_shape(t, 2), ScalarType::Long);
  Tensor info = empty_cpu(batch_shape(t, 2), ScalarType::Int);
  in.for_each([&](int64_t index, bool parallel) {
    std::vector<double> gram(static_cast<size_t>(s * s));
    TallGram mine = in.of(index);
    mine.gram = gram.data();
    mine.cross = static_cast<double*>(cross.data_ptr()) + index * s * k;
    sum_rows(mine, in.rows, parallel);
    const int64_t found = factor(
        in, index, parallel, gram.data(), static_cast<double*>(left.data_ptr()) + index * s * s,
        static_cast<double*>(right.data_ptr()) + index * s * s, well_conditioned, shift, kept);
    static_cast<int64_t*>(rank.data_ptr())[index] = std::max<int64_t>(found, 0);
    static_cast<int32_t*>(info.data_ptr())[index] = found < 0;
  });
  return {left, right, cross, rank, info};
}

// --- narrow_ridge
// -------------------------------------------------------------------------------------

// (T^T T + lam I)^-1 C of one matrix from its float64 Gram, C (s x k) in x, which the solution
// replaces; returns a bound of the condition of the system with a unit diagonal, infinite where it
// is not positive definite in rounding.
double solve_gram(int64_t s, int64_t k, double lam, std::vector<double>& gram, double* x) {
  const auto size = static_cast<size_t>(s * s);
  std::vector<double> scale(static_cast<size_t>(s)), inverse(size),
      half(static_cast<size_t>(s * k));
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < s; ++i) {
    const double square = gram[i * s + i] + lam;
    if (!(square > 0) || !std::isfinite(square)) return kInfinity;
    scale[i] = 1 / std::sqrt(square);
  }
  double norm = 0;
  for (int64_t i = 0; i < s; ++i) {
    for (int64_t j = 0; j < s; ++j) {
      double& value = gram[i * s + j];
      value = i == j ? 1.0 : value * scale[i] * scale[j];
      norm += value * value;
    }
  }
  if (!inverse_factor(s, gram.data(), inverse.data())) return kInfinity;
  double trace = 0;
  for (double value : inverse) trace += value * value;
  for (int64_t i = 0; i < s; ++i) {  // half = L^-1 D C
    double* row = half.data() + i * k;
    std::fill_n(row, k, 0.0);
    for (int64_t j = 0; j <= i; ++j) {
      const double factor = inverse[i * s + j] * scale[j];
      for (int64_t c = 0; c < k; ++c) row[c] += factor * x[j * k + c];
    }
  }
  for (int64_t i = 0; i < s; ++i) {  // D L^-T half
    double* row = x + i * k;
    std::fill_n(row, k, 0.0);
    for (int64_t j = i; j < s; ++j) {
      const double factor = inverse[j * s + i] * scale[i];
      for (int64_t c = 0; c < k; ++c) row[c] += factor * half[j * k + c];
    }
  }
  return std::sqrt(norm) * trace;
}

std::tuple<Tensor, Tensor> narrow_ridge(const Tensor& t, const std::optional<Tensor>& b,
                                        const std::optional<Tensor>& right, const Tensor& lam) {
  Checked check("narrow_ridge");
  Size m{"m"}, order{"s"}, k_size{"k"};
  check.tensor("t", t, kFloats, {m, order});
  check.tensor("b", b, kFloats, {m, k_size});
  check.tensor("right", right, kFloat64, {order, k_size});
  check.scalar("lam", lam, kFloat64);
  if (!b && !right) throw std::runtime_error("cfl_ops.narrow_ridge: b or right must be given");
  const Inputs in(t, b, std::nullopt);
  const int64_t s = in.args.s, k = b ? in.args.k : right->size(right->dim() - 1);
  Tensor solution = empty_cpu(batch_shape(t, 2, {s, k}), ScalarType::Double);
  Tensor condition = empty_cpu(batch_shape(t, 2), ScalarType::Double);
  const Batched lams(lam, 0);
  std::optional<Tensor> added;
  Batched rights;
  if (right) {
    added = torch::stable::contiguous(*right);
    rights = Batched(*added, 2);
  }
  in.for_each([&](int64_t index, bool parallel) {
    double* x = static_cast<double*>(solution.data_ptr()) + index * s * k;
    std::vector<double> gram(static_cast<size_t>(s * s));
    TallGram mine = in.of(index);
    mine.gram = gram.data();
    mine.cross = x;
    sum_rows(mine, in.rows, parallel);
    if (right) {
      const double* extra = rights.at<double>(index);
      for (int64_t i = 0; i < s * k; ++i) x[i] = extra[i] + (b ? x[i] : 0.0);
    }
    static_cast<double*>(condition.data_ptr())[index] =
        solve_gram(s, k, *lams.at<double>(index), gram, x);
  });
  return {solution, condition};
}

}  // namespace
}  // namespace cfl::cpu

STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CPU, m) {
  m.impl("tall_gram", TORCH_BOX(&cfl::cpu::tall_gram));
  if (!cfl::cpu::blas_available()) return;  // the Python fallback serves instead
  m.impl("tall_factor", TORCH_BOX(&cfl::cpu::tall_factor));
  m.impl("narrow_ridge", TORCH_BOX(&cfl::cpu::narrow_ridge));
}
