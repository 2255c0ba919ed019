// ridge_solve on the CPU: batches of small systems side by side in the lanes of a vector register,
// larger ones through torch's LAPACK. Semantics: python/cfl_ops/ops/solve/system.py (the fallback).
//
// A solution is given only where its error is known to be small (solve_kernel.h says how a factor
// shows it). float32 systems are factored in float32; where that proves nothing they are solved
// again in float64, and what proves nothing there is solved with residuals in twice the precision,
// which tell the error (solve_careful.cpp).
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/blas.h"
#include "cpu/gram_kernel.h"
#include "cpu/kept_memory.h"
#include "cpu/solve_careful.h"
#include "cpu/solve_kernel.h"
#include "cpu/tensor.h"

namespace cfl::cpu {
namespace {

using detail::SolveGroup;
using detail::SolveKernel;

constexpr int32_t kBadPenalty = -1;
constexpr int64_t kSmall = 128;  // the largest order that is solved side by side

// A pivot below this times its diagonal entry is a rounding error.
template <class T>
constexpr double kTolerance = 4.0 * std::numeric_limits<T>::epsilon();
// The largest (norm of the inverse) times (ratio of scales), see solve_kernel.h, at which an error
// of 2 sqrt(n) eps times that is a small one: the rounding errors of n terms add up like their
// root.
template <class T>
double limit_of(int64_t n) {
  return 0.025 / (std::sqrt(static_cast<double>(n)) * std::numeric_limits<T>::epsilon());
}
// Of the limit, where float32 systems are solved in float64: what is right there to float32.
constexpr double kAgain = 1e-5;
// The range of a diagonal in which nothing over- or underflows.
template <class T>
constexpr double kSmallest =
    100.0 * std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
template <class T>
constexpr double kLargest = std::numeric_limits<T>::max() * std::numeric_limits<T>::epsilon() *
                            std::numeric_limits<T>::epsilon();

template <class T>
void set_limits(SolveGroup& group, double limit) {
  group.tolerance = kTolerance<T>;
  group.limit = limit * limit;
  group.smallest = kSmallest<T>;
  group.largest = kLargest<T>;
}

detail::SolveKernels kernels() {
  switch (isa()) {
#if defined(CFL_HAVE_X86_ISAS)
    case Isa::kAmx:
    case Isa::kAvx512:
      return detail::solve_kernels_avx512();
    case Isa::kAvx2:
      return detail::solve_kernels_avx2();
#endif
    default:
      return detail::solve_kernels_generic();
  }
}

template <class T>
const SolveKernel& kernel() {
  const auto kernels = cfl::cpu::kernels();
  return std::is_same_v<T, float> ? *kernels.f32 : *kernels.f64;
}

// Element i of a batch, without a division where the batch has a single stride.
class Walk {
 public:
  Walk() = default;
  Walk(const Tensor& tensor, int64_t core)
      : batched_(tensor, core), data_(static_cast<char*>(tensor.data_ptr())) {
    const int64_t dims = tensor.dim() - core;
    const auto element = static_cast<int64_t>(tensor.element_size());
    int64_t expected = 0;
    bool first = true;
    for (int64_t i = dims - 1; i >= 0; --i) {
      if (tensor.size(i) == 1) continue;
      if (first) {
        stride_ = tensor.stride(i) * element;
        first = false;
      } else if (tensor.stride(i) * element != expected) {
        simple_ = false;
      }
      expected = (first ? 0 : tensor.stride(i) * element) * tensor.size(i);
    }
  }
  template <class T>
  T* at(int64_t index) const {
    if (simple_) return reinterpret_cast<T*>(data_ + index * stride_);
    return batched_.at<T>(index);
  }

 private:
  Batched batched_;
  char* data_ = nullptr;
  int64_t stride_ = 0;
  bool simple_ = true;
};

template <class T>
struct Systems {
  int64_t n, k, batch;
  Walk a, b, x, shift_diag;
  bool upper, has_diag;
  const double* shift;  // one number, or one for each system
  bool one_shift;
  int32_t* info;
  double shift_of(int64_t i) const { return shift[one_shift ? 0 : i]; }
};

bool bad_penalty(double value) { return !(value >= 0) || !std::isfinite(value); }

template <class T>
bool penalty_is_bad(const Systems<T>& s, int64_t index) {
  if (bad_penalty(s.shift_of(index))) return true;
  if (!s.has_diag) return false;
  const T* diag = s.shift_diag.template at<T>(index);
  return std::any_of(diag, diag + s.n, [](T value) { return bad_penalty(value); });
}

template <class T>
void fill_nan(T* x, int64_t count) {
  std::fill_n(x, count, std::numeric_limits<T>::quiet_NaN());
}

// Whether the factor L (n x n) of a system with this diagonal proves its solutions: as SolveGroup.
// y is room for n numbers.
template <class Acc>
bool proven(int64_t n, const Acc* l, const Acc* diagonal, double limit, Acc* y) {
  Acc largest = 0, smallest = std::numeric_limits<Acc>::infinity(), spread = Acc(2.7183);
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, diagonal[i]);
    smallest = std::min(smallest, diagonal[i]);
    spread *= diagonal[i] / l[i * n + i] / l[i * n + i];
  }
  if (!(smallest >= Acc(kSmallest<Acc>) && largest <= Acc(kLargest<Acc>))) return false;
  const Acc most = Acc(limit) * std::sqrt(smallest / largest);
  if (spread <= most) return true;
  Acc before = 0, after = 0;
  for (int64_t i = 0; i < n; ++i) {
    constexpr int64_t kParts = 16;  // so that the compiler can use vectors
    const Acc* row = l + i * n;
    Acc part[kParts] = {}, sum = 0;
    int64_t j = 0;
    for (; j + kParts <= i; j += kParts) {
      for (int64_t p = 0; p < kParts; ++p) part[p] -= row[j + p] * y[j + p];
    }
    for (; j < i; ++j) sum -= row[j] * y[j];
    for (int64_t p = 0; p < kParts; ++p) sum += part[p];
    const Acc own = std::sqrt(diagonal[i]);
    y[i] = (sum < 0 ? sum - own : sum + own) / row[i];
    before += y[i] * y[i];
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    const Acc* row = l + i * n;
    const Acc z = y[i] / row[i];
    after += z * z * diagonal[i];
    for (int64_t j = 0; j < i; ++j) y[j] -= row[j] * z;
  }
  return after / before <= most;
}

// One system through LAPACK, in Acc: whether its solution is right. x may be written in any case.
template <class T, class Acc>
bool solve_one(const Systems<T>& s, int64_t index, T* x) {
  const int64_t n = s.n, k = s.k;
  thread_local KeptMemory memory;
  constexpr bool kCopyRight = !std::is_same_v<T, Acc>;
  Acc* system = memory.get<Acc>(static_cast<size_t>(n * n + 2 * n + (kCopyRight ? n * k : 0)));
  Acc *original = system + n * n, *y = original + n;
  copy_lower(n, s.a.template at<T>(index), s.upper, system);
  const T* diag = s.has_diag ? s.shift_diag.template at<T>(index) : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    system[i * n + i] +=
        static_cast<Acc>(s.shift_of(index)) + (diag ? static_cast<Acc>(diag[i]) : Acc(0));
    original[i] = system[i * n + i];
  }
  if (potrf_lower(n, system, n) != 0) return false;
  for (int64_t i = 0; i < n; ++i) {
    const Acc pivot = system[i * n + i] * system[i * n + i];
    if (!(pivot > static_cast<Acc>(kTolerance<Acc>) * original[i]) || !std::isfinite(pivot)) {
      return false;
    }
  }
  const double limit = limit_of<Acc>(n) * (std::is_same_v<T, Acc> ? 1.0 : kAgain);
  if (!proven(n, system, original, limit, y)) return false;
  const T* b = s.b.template at<T>(index);
  if constexpr (kCopyRight) {
    Acc* right = y + n;
    std::copy_n(b, n * k, right);
    potrs_lower(n, k, system, n, right, k);
    std::copy_n(right, n * k, x);
  } else {
    std::copy_n(b, n * k, x);
    potrs_lower(n, k, system, n, x, k);
  }
  return true;
}

template <class T>
int32_t carefully(const Systems<T>& s, int64_t index, T* x) {
  CarefulSystem<T> system;
  system.n = s.n;
  system.k = s.k;
  system.a = s.a.template at<T>(index);
  system.upper = s.upper;
  system.shift = s.shift_of(index);
  system.shift_diag = s.has_diag ? s.shift_diag.template at<T>(index) : nullptr;
  system.b = s.b.template at<T>(index);
  system.x = x;
  const int32_t info = solve_carefully(system);
  if (info != 0) fill_nan(x, s.n * s.k);
  return info;
}

template <class T>
void solve_large(const Systems<T>& s, int64_t index) {
  T* x = s.x.template at<T>(index);
  if (penalty_is_bad(s, index)) {
    fill_nan(x, s.n * s.k);
    s.info[index] = kBadPenalty;
    return;
  }
  bool right = solve_one<T, T>(s, index, x);
  if (std::is_same_v<T, float> && !right) right = solve_one<T, double>(s, index, x);
  s.info[index] = right ? 0 : carefully(s, index, x);
}

// The float64 answer of the systems of a float32 group that are in doubt.
void solve_again(const Systems<float>& s, int64_t first, const SolveGroup& group, int32_t* info) {
  const SolveKernel& wide = kernel<double>();
  const int64_t n = s.n, k = s.k, size = n * n, right = n * k;
  thread_local KeptMemory numbers, scratch;
  // Per lane: the system, its right sides, its solution and its penalties; then the shifts.
  const int64_t per_lane = size + 2 * right + n;
  double* at = numbers.get<double>(static_cast<size_t>(wide.lanes * (per_lane + 1)));
  std::vector<const void*> a(wide.lanes), b(wide.lanes), diag(wide.lanes);
  std::vector<void*> x(wide.lanes);
  std::vector<int64_t> lane_of;
  std::vector<int32_t> codes(wide.lanes);
  double* shift = at + wide.lanes * per_lane;

  auto flush = [&] {
    for (size_t i = 0; i < static_cast<size_t>(wide.lanes); ++i) {
      const size_t from = std::min(i, lane_of.size() - 1);  // idle lanes repeat the last system
      double* base = at + static_cast<int64_t>(from) * per_lane;
      a[i] = base;
      b[i] = base + size;
      x[i] = base + size + right;
      diag[i] = base + size + 2 * right;
      shift[i] = shift[from];
    }
    SolveGroup again;
    again.n = n;
    again.k = k;
    again.valid = static_cast<int64_t>(lane_of.size());
    again.a = a.data();
    again.b = b.data();
    again.x = x.data();
    again.upper = s.upper;
    again.shift = shift;
    again.shift_diag = s.has_diag ? diag.data() : nullptr;
    set_limits<double>(again, kAgain * limit_of<double>(n));
    again.info = codes.data();
    again.scratch = scratch.get<char>(wide.scratch_bytes(n, k));
    wide.run(&again);
    for (size_t i = 0; i < lane_of.size(); ++i) {
      const int64_t lane = lane_of[i];
      info[lane] = codes[i];
      std::copy_n(static_cast<const double*>(x[i]), right, static_cast<float*>(group.x[lane]));
    }
    lane_of.clear();
  };

  for (int64_t lane = 0; lane < group.valid; ++lane) {
    if (info[lane] == 0) continue;
    double* base = at + static_cast<int64_t>(lane_of.size()) * per_lane;
    std::copy_n(static_cast<const float*>(group.a[lane]), size, base);
    std::copy_n(static_cast<const float*>(group.b[lane]), right, base + size);
    if (s.has_diag)
      std::copy_n(static_cast<const float*>(group.shift_diag[lane]), n, base + size + 2 * right);
    shift[lane_of.size()] = s.shift_of(first + lane);
    lane_of.push_back(lane);
    if (static_cast<int>(lane_of.size()) == wide.lanes) flush();
  }
  if (!lane_of.empty()) flush();
}

template <class T>
void solve_groups(const Systems<T>& s, int64_t begin, int64_t end) {
  const SolveKernel& k = kernel<T>();
  const int64_t lanes = k.lanes;
  thread_local KeptMemory memory;
  alignas(64) T shift[64 / sizeof(T)];
  const void *a[2][16], *b[2][16], *diag[16];
  void* x[16];
  int32_t info[16];
  SolveGroup group;
  group.n = s.n;
  group.k = s.k;
  group.x = x;
  group.upper = s.upper;
  group.shift = shift;
  group.shift_diag = s.has_diag ? diag : nullptr;
  set_limits<T>(group, limit_of<T>(s.n));
  group.info = info;
  group.scratch = memory.get<char>(k.scratch_bytes(s.n, s.k));

  auto systems_of = [&](int64_t group_index) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t i = std::min(group_index * lanes + lane, s.batch - 1);
      a[group_index & 1][lane] = s.a.template at<T>(i);
      b[group_index & 1][lane] = s.b.template at<T>(i);
    }
  };
  systems_of(begin);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index * lanes;
    group.valid = std::min(lanes, s.batch - first);
    group.a = a[index & 1];
    group.b = b[index & 1];
    if (index + 1 < end) systems_of(index + 1);
    group.next_a = index + 1 < end ? a[(index + 1) & 1] : nullptr;
    group.next_b = index + 1 < end ? b[(index + 1) & 1] : nullptr;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t i = std::min(first + lane, s.batch - 1);
      x[lane] = s.x.template at<T>(i);
      if (s.has_diag) diag[lane] = s.shift_diag.template at<T>(i);
      shift[lane] = static_cast<T>(s.shift_of(i));
    }
    k.run(&group);
    group.first = false;
    if constexpr (std::is_same_v<T, float>) {
      if (std::any_of(info, info + group.valid, [](int32_t code) { return code != 0; })) {
        solve_again(s, first, group, info);
      }
    }
    for (int64_t lane = 0; lane < group.valid; ++lane) {
      int32_t code = info[lane];
      if ((!s.one_shift || s.has_diag) && penalty_is_bad(s, first + lane)) {
        code = kBadPenalty;
        fill_nan(static_cast<T*>(x[lane]), s.n * s.k);
      } else if (code != 0) {
        code = carefully(s, first + lane, static_cast<T*>(x[lane]));
      }
      s.info[first + lane] = code;
    }
  }
}

template <class T>
void solve(const Systems<T>& s) {
  if (s.batch == 0) return;
  if (s.one_shift && bad_penalty(s.shift[0])) {
    for (int64_t i = 0; i < s.batch; ++i) fill_nan(s.x.template at<T>(i), s.n * s.k);
    std::fill_n(s.info, s.batch, kBadPenalty);
    return;
  }
  if (s.n == 0) {
    for (int64_t i = 0; i < s.batch; ++i) s.info[i] = penalty_is_bad(s, i) ? kBadPenalty : 0;
    return;
  }
  const int64_t lanes = kernel<T>().lanes;
  // A group costs about as much as two systems through LAPACK, or one where the calls are what
  // costs.
  if (s.n <= kSmall && (s.batch >= 3 || s.n <= 16)) {
    const int64_t groups = (s.batch + lanes - 1) / lanes;
    const int64_t work = std::max<int64_t>(1, s.n * s.n * (s.n / 3 + 2 * s.k) * lanes / 4);
    torch::stable::parallel_for(0, groups, std::max<int64_t>(1, 100000 / work),
                                [&](int64_t begin, int64_t end) { solve_groups(s, begin, end); });
  } else if (s.batch == 1) {
    solve_large(s, 0);  // LAPACK has the threads to itself
  } else {
    torch::stable::parallel_for(0, s.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) solve_large(s, i);
    });
  }
}

// --- from tensors
// ------------------------------------------------------------------------------------

bool dense(const Tensor& tensor, bool transposed) {
  const int64_t ndim = tensor.dim(), rows = tensor.size(ndim - 2), cols = tensor.size(ndim - 1);
  const int64_t row = tensor.stride(ndim - 2), col = tensor.stride(ndim - 1);
  if (transposed) return (rows <= 1 || row == 1) && (cols <= 1 || col == rows);
  return (cols <= 1 || col == 1) && (rows <= 1 || row == cols);
}

Tensor in_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

template <class T>
void run(const Tensor& gram, const Tensor& cross, const Tensor& lam,
         const std::optional<Tensor>& lam_diag, const Tensor& x, const Tensor& info) {
  constexpr ScalarType kType = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
  Tensor a = in_dtype(gram, kType), b = in_dtype(cross, kType);
  Systems<T> s{};
  s.upper = !dense(a, false) && dense(a, true);
  if (!s.upper && !dense(a, false)) a = torch::stable::contiguous(a);
  if (!dense(b, false)) b = torch::stable::contiguous(b);
  const Tensor shift = torch::stable::contiguous(in_dtype(lam, ScalarType::Double));
  std::optional<Tensor> diag;
  if (lam_diag) {
    diag = in_dtype(*lam_diag, kType);
    if (diag->size(diag->dim() - 1) > 1 && diag->stride(diag->dim() - 1) != 1) {
      diag = torch::stable::contiguous(*diag);
    }
    s.shift_diag = Walk(*diag, 1);
  }
  s.n = a.size(a.dim() - 1);
  s.k = b.size(b.dim() - 1);
  s.batch = product(batch_shape(a, 2));
  s.a = Walk(a, 2);
  s.b = Walk(b, 2);
  s.x = Walk(x, 2);
  s.has_diag = lam_diag.has_value();
  s.shift = static_cast<const double*>(shift.data_ptr());
  s.one_shift = shift.dim() == 0;
  s.info = static_cast<int32_t*>(info.data_ptr());
  solve(s);
}

std::tuple<Tensor, Tensor> ridge_solve(const Tensor& gram, const Tensor& cross, const Tensor& lam,
                                       const std::optional<Tensor>& lam_diag) {
  Checked check("ridge_solve");
  Size D{"D"}, K{"K"};
  check.tensor("gram", gram, kFloats, {D, D});
  check.tensor("cross", cross, kFloats, {D, K});
  check.scalar("lam", lam, kFloats);
  check.tensor("lam_diag", lam_diag, kFloats, {D});
  auto is = [&](ScalarType dtype) {
    return gram.scalar_type() == dtype || cross.scalar_type() == dtype;
  };
  const bool wide = is(ScalarType::Double);
  Tensor x = empty_cpu(batch_shape(cross, 0), wide ? ScalarType::Double : ScalarType::Float);
  Tensor info = empty_cpu(batch_shape(gram, 2), ScalarType::Int);
  (wide ? &run<double> : &run<float>)(gram, cross, lam, lam_diag, x, info);
  if (!wide && !is(ScalarType::Float)) {
    const bool same = gram.scalar_type() == cross.scalar_type();
    if (same) x = torch::stable::to(x, gram.scalar_type());
  }
  return {x, info};
}

// --- small_pinv
// ---------------------------------------------------------------------------------------

// P of a batch of small matrices of full rank, and info: 1 where another path has to do it.
std::tuple<Tensor, Tensor> small_pinv(const Tensor& a, double limit) {
  Checked check("small_pinv");
  Size m{"m"}, n{"n"};
  check.tensor("a", a, kFloats, {m, n});
  check.that(limit > 0, "limit", "must be positive, but got ", limit);
  const int64_t rows = m.value, cols = n.value;
  const bool is_double = a.scalar_type() == ScalarType::Double;
  Tensor in = is_double ? a : in_dtype(a, ScalarType::Float);
  if (!dense(in, false)) in = torch::stable::contiguous(in);
  Tensor p = empty_cpu(batch_shape(a, 2, {cols, rows}),
                       is_double ? ScalarType::Double : ScalarType::Float);
  Tensor info = empty_cpu(batch_shape(a, 2), ScalarType::Int);
  const auto kernels = cfl::cpu::kernels();
  const detail::PinvKernel& kernel = is_double ? *kernels.pinv_f64 : *kernels.pinv_f32;
  const int64_t batch = product(batch_shape(a, 2)), lanes = kernel.lanes;
  const Walk ins(in, 2), outs(p, 2);
  auto* infos = static_cast<int32_t*>(info.data_ptr());
  torch::stable::parallel_for(0, (batch + lanes - 1) / lanes, 1, [&](int64_t begin, int64_t end) {
    thread_local KeptMemory memory;
    const void* t[16];
    void* out[16];
    int32_t codes[16];
    detail::PinvGroup group;
    group.m = std::max(rows, cols);
    group.s = std::min(rows, cols);
    group.wide = rows < cols;
    group.t = t;
    group.p = out;
    group.limit = limit;
    // The trace of the inverse is at least 1 / pivot; without this a pivot of mere rounding could
    // pass, for T^T has nothing along it that would show in P.
    group.tolerance =
        std::max(1 / limit, static_cast<double>(group.s) * std::numeric_limits<double>::epsilon());
    group.refine = is_double;
    group.info = codes;
    group.scratch = memory.get<char>(kernel.scratch_bytes(group.m, group.s));
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * lanes;
      group.valid = std::min(lanes, batch - first);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t i = std::min(first + lane, batch - 1);
        t[lane] = ins.at<char>(i);
        out[lane] = outs.at<char>(i);
      }
      kernel.run(&group);
      std::copy_n(codes, group.valid, infos + first);
    }
  });
  if (a.scalar_type() != p.scalar_type()) p = torch::stable::to(p, a.scalar_type());
  return {p, info};
}

}  // namespace
}  // namespace cfl::cpu

STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CPU, m) {
  m.impl("small_pinv", TORCH_BOX(&cfl::cpu::small_pinv));
  if (!cfl::cpu::blas_available()) return;  // the Python fallback serves instead
  m.impl("ridge_solve", TORCH_BOX(&cfl::cpu::ridge_solve));
}
