// cholesky_update on the CPU: which kernel treats which matrix, and what is left as it was on
// failure. Semantics: python/cfl_ops/ops/cholesky/update.py, safe.py (the fallback); mathematics:
// cholesky_kernel.h.
#include "cpu/cholesky.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/blas.h"
#include "cpu/downdate.h"
#include "cpu/kept_memory.h"
#include "cpu/tensor.h"

namespace cfl::cpu {
namespace {

enum Info : int32_t { kBadV = -1, kBadL = -2 };

// What a thread keeps of w and backup for its next call.
constexpr size_t kKept = 16 << 20;  // bytes
struct Workspaces {
  KeptMemory w, coefficients, backup;
};
Workspaces& workspaces() {
  static thread_local Workspaces instance;
  return instance;
}

template <class T>
struct Update {
  int64_t order, rank;  // D, k
  T scale, v_scale;     // sqrt(decay), sqrt(|alpha|)
  bool down;
};

// The same by refactorisation; false, with L unchanged, where that is not as accurate as an update.
template <class T>
bool refactor(const UpdateArgs<T>& a, const FactorView<T>& l, KeptMemory& work) {
  const int64_t D = a.order;
  T* system = work.get<T>(2 * D * D);
  T* lower = system + D * D;
  for (int64_t i = 0; i < D; ++i) {
    for (int64_t j = 0; j < D; ++j) lower[i * D + j] = j <= i ? a.scale * l.at(i, j) : T(0);
  }
  gemm(false, true, D, D, D, T(1), lower, D, lower, D, T(0), system, D);
  gemm(true, false, D, D, a.rank, T(1), a.w, a.ldw, a.w, a.ldw, T(1), system, D);
  T* diagonal = lower;
  for (int64_t i = 0; i < D; ++i) diagonal[i] = system[i * (D + 1)];
  if (potrf_lower(D, system, D) != 0) return false;
  for (int64_t i = 0; i < D; ++i) {
    const T pivot = system[i * (D + 1)];
    if (!(pivot * pivot * T(kRefactorLoss) > diagonal[i])) return false;
  }
  for (int64_t i = 0; i < D; ++i) {
    for (int64_t j = 0; j <= i; ++j) l.at(i, j) = system[i * D + j];
  }
  return true;
}

template <class T>
Downdated<T> downdated(const Update<T>& u, const FactorView<T>& l, const FactorView<const T>& v) {
  return {u.order, u.rank,       l.data,       l.row_stride, l.col_stride,
          v.data,  v.row_stride, v.col_stride, u.v_scale};
}

// L (unit stride in one dimension) in place; 0 or why not, with L then unchanged.
template <class T>
int32_t update_one(const Update<T>& u, const FactorView<T>& l, const FactorView<const T>& v) {
  const CholeskyKernel<T>& k = cholesky_kernel<T>();
  const int64_t D = u.order;
  if (D == 0) return 0;
  Workspaces& work = workspaces();
  UpdateArgs<T> args;
  args.order = D;
  args.rank = u.rank <= 2 ? std::max<int64_t>(u.rank, 1) : (u.rank + 3) / 4 * 4;
  args.ldw = (D + kTileRows + 15) / 16 * 16;
  args.w = work.w.get<T>(args.rank * args.ldw);
  T size = 0;
  for (int64_t p = 0; p < args.rank; ++p) {
    T* column = args.w + p * args.ldw;
    const bool given = p < u.rank;
    for (int64_t i = 0; given && i < D; ++i) column[i] = u.v_scale * v.at(i, p);
    std::fill(column + (given ? D : 0), column + args.ldw, T(0));
    if (given) size += k.abs_sum(column, D);
  }
  if (!std::isfinite(size)) {
    for (int64_t i = 0; i < D; ++i) {
      for (int64_t p = 0; p < u.rank; ++p) {
        if (!std::isfinite(v.at(i, p))) return kBadV;
      }
    }
  }
  T l_size = 0;
  lower_runs(l, D, [&](const T* run, int64_t length) { l_size += k.abs_sum(run, length); });
  if (!std::isfinite(l_size) && !lower_finite(l, D)) return kBadL;

  // An update of moderate numbers cannot fail, for no row grows past the sum of sizes.
  const T bound = std::numeric_limits<T>::max() / 4;
  const bool safe = !u.down && size < bound && l_size < bound && u.scale * l_size < bound;
  T* backup = nullptr;
  if (!safe) {
    T* to = backup = work.backup.get<T>(D * (D + 1) / 2);
    lower_runs(l, D, [&](const T* run, int64_t length) {
      std::memcpy(to, run, length * sizeof(T));
      to += length;
    });
  }
  args.l = l.data;
  args.row_stride = l.row_stride;
  args.col_stride = l.col_stride;
  args.coefficients = work.coefficients.get<T>(kPanel * (4 * args.rank + 16));
  args.scale = u.scale;
  args.down = u.down;
  args.moderate = size < kModerate<T> && l_size < kModerate<T> && u.scale * l_size < kModerate<T>;
  if (args.moderate && !u.down && D >= kRefactorOrder && u.rank >= kRefactorRatio * D &&
      blas_available() && refactor(args, l, work.backup)) {
    return 0;
  }
  int64_t info = k.update(args);
  if (info == 0 && u.down) {
    double growth = 1;
    int64_t old = 0;  // of the backup's diagonal
    for (int64_t i = 0; i < D; ++i) {
      old += l.col_stride == 1 ? i : 0;
      growth *= std::abs(double(u.scale) * double(backup[old])) / double(l.at(i, i));
      old += l.col_stride == 1 ? 1 : D - i;
    }
    info = downdated(u, l, v).lost(growth);
  }
  if (info != 0 && backup) {
    lower_runs(l, D, [&](T* run, int64_t length) {
      std::memcpy(run, backup, length * sizeof(T));
      backup += length;
    });
  }
  work.w.trim(kKept);
  work.backup.trim(kKept);
  return static_cast<int32_t>(info);
}

template <class T>
struct Batch {
  Update<T> update;
  Batched l, v;
  int64_t count;
  int64_t l_row, l_col, v_row, v_col;  // strides
  bool grouped;
  int32_t* info;

  FactorView<T> factor(int64_t i) const { return {l.at<T>(i), l_row, l_col}; }
  FactorView<const T> vectors(int64_t i) const { return {v.at<T>(i), v_row, v_col}; }

  void one(int64_t i) const { info[i] = update_one(update, factor(i), vectors(i)); }

  void group(int64_t begin, int64_t end) const {
    const CholeskyKernel<T>& k = cholesky_kernel<T>();
    const int64_t D = update.order;
    T* factors[16];
    const T* vs[16];
    Workspaces& work = workspaces();
    // Lanes without a matrix work on an identity that nobody reads, and the last matrix's vectors.
    std::vector<T> identity;
    if (end - begin < k.lanes) {
      identity.assign(D * D, T(0));
      for (int64_t i = 0; i < D; ++i) identity[i * (D + 1)] = T(1);
    }
    for (int64_t m = 0; m < k.lanes; ++m) {
      const bool given = begin + m < end;
      factors[m] = given ? l.at<T>(begin + m) : identity.data();
      vs[m] = v.at<T>(given ? begin + m : end - 1);
    }
    GroupArgs<T> args;
    args.order = D;
    args.rank = update.rank;
    args.l = factors;
    args.row_major = l_col == 1;
    args.v = vs;
    args.v_row_stride = v_row;
    args.v_col_stride = v_col;
    args.scratch = work.w.get<T>(k.lanes * D * (D + 1 + update.rank));
    args.scale = update.scale;
    args.v_scale = update.v_scale;
    args.down = update.down;
    T* before = nullptr;
    if (update.down) {
      before = work.backup.get<T>((end - begin) * D * D);
      for (int64_t m = 0; m < end - begin; ++m) {
        std::memcpy(before + m * D * D, factors[m], D * D * sizeof(T));
      }
    }
    const uint32_t done = k.update_group(args);
    for (int64_t i = begin; i < end; ++i) {
      if (!(done >> (i - begin) & 1)) continue;
      info[i] = 0;
      if (!update.down) continue;
      const T* old = before + (i - begin) * D * D;
      double growth = 1;
      for (int64_t j = 0; j < D; ++j) {
        growth *=
            std::abs(double(update.scale) * double(old[j * (D + 1)])) / double(factor(i).at(j, j));
      }
      info[i] = static_cast<int32_t>(downdated(update, factor(i), vectors(i)).lost(growth));
      if (info[i] != 0) std::memcpy(factors[i - begin], old, D * D * sizeof(T));
    }
    for (int64_t i = begin; i < end; ++i) {  // these use the backup's memory, too
      if (!(done >> (i - begin) & 1)) one(i);
    }
  }

  static void run(int64_t begin, int64_t end, void* context) {
    const Batch& batch = *static_cast<const Batch*>(context);
    if (batch.grouped) {
      const int64_t lanes = cholesky_kernel<T>().lanes;
      for (int64_t g = begin; g < end; ++g) {
        batch.group(g * lanes, std::min(batch.count, (g + 1) * lanes));
      }
    } else {
      for (int64_t i = begin; i < end; ++i) batch.one(i);
    }
  }
};

// Below this order a group of matrices is faster side by side than one by one.
constexpr int64_t kGroupOrder = 48;

// L has unit stride in one of its last two dimensions.
template <class T>
void update_batch(const Tensor& l, const Tensor& v, double alpha, double decay,
                  const Tensor& info) {
  Batch<T> batch{};
  const int64_t l_dims = l.dim(), v_dims = v.dim();
  const int64_t D = l.size(l_dims - 1), k = v.size(v_dims - 1);
  batch.update = {D, k, static_cast<T>(std::sqrt(decay)),
                  static_cast<T>(std::sqrt(std::abs(alpha))), alpha < 0};
  batch.l = Batched(l, 2);
  batch.v = Batched(v, 2);
  batch.count = product(batch_shape(l, 2));
  batch.l_row = l.stride(l_dims - 2);
  batch.l_col = l.stride(l_dims - 1);
  batch.v_row = v.stride(v_dims - 2);
  batch.v_col = v.stride(v_dims - 1);
  batch.info = static_cast<int32_t*>(info.data_ptr());
  const int64_t lanes = cholesky_kernel<T>().lanes;
  const bool dense = std::max(batch.l_row, batch.l_col) == D;
  batch.grouped = dense && k >= 1 && k <= kGroupRank && D * D >= lanes && D <= kGroupOrder &&
                  batch.count >= lanes / 2;
  const int64_t jobs = batch.grouped ? (batch.count + lanes - 1) / lanes : batch.count;
  const int64_t work = D * D * (k + 2) * (batch.grouped ? lanes : 1);
  const int64_t grain = std::max<int64_t>(1, 200000 / std::max<int64_t>(work, 1));
  if (jobs <= grain) {
    Batch<T>::run(0, jobs, &batch);
  } else {
    parallel_for(0, jobs, grain, &Batch<T>::run, &batch);
  }
}

bool unit_strided(const Tensor& l) {
  const int64_t dims = l.dim(), order = l.size(dims - 1);
  if (order <= 1) return true;
  const int64_t row = l.stride(dims - 2), col = l.stride(dims - 1);
  return (col == 1 && row >= order) || (row == 1 && col >= order);
}

void update_any(const Tensor& l, const Tensor& v, double alpha, double decay, const Tensor& info) {
  if (l.scalar_type() == ScalarType::Double) {
    update_batch<double>(l, v, alpha, decay, info);
  } else {
    update_batch<float>(l, v, alpha, decay, info);
  }
}

void check_update(Checked& check, const Tensor& v, Dtypes dtype, Size& order, double alpha,
                  double decay) {
  Size rank{"k"};
  check.tensor("V", v, dtype, {order, rank});
  check.number("alpha", alpha);
  check.number("decay", decay, 0);
}

Tensor cholesky_update_(const Tensor& l, const Tensor& v, double alpha, double decay) {
  Checked check("cholesky_update_");
  Size D{"D"};
  check.written("L", l, kReals, {D, D});
  check_update(check, v, dtype_of(l), D, alpha, decay);
  check.apart();
  Tensor info = empty_cpu(batch_shape(l, 2), ScalarType::Int);
  if (unit_strided(l)) {
    update_any(l, v, alpha, decay, info);
  } else {
    Tensor packed = torch::stable::contiguous(l);
    update_any(packed, v, alpha, decay, info);
    Tensor out = l;
    torch::stable::copy_(out, packed);
  }
  return info;
}

// out (contiguous) = the lower triangle of l, zeros above.
template <class T>
void copy_lower(const Tensor& l, const Tensor& out) {
  const int64_t dims = l.dim(), D = l.size(dims - 1);
  const int64_t rs = l.stride(dims - 2), cs = l.stride(dims - 1);
  const Batched from(l, 2);
  T* to = static_cast<T*>(out.data_ptr());
  const int64_t count = product(batch_shape(l, 2));
  constexpr int64_t kBlock = 32;  // both sides of a transposition stay in the cache
  for (int64_t b = 0; b < count; ++b, to += D * D) {
    const T* src = from.at<T>(b);
    for (int64_t i = 0; cs == 1 && i < D; ++i) {
      std::memcpy(to + i * D, src + i * rs, (i + 1) * sizeof(T));
      std::fill(to + i * D + i + 1, to + (i + 1) * D, T(0));
    }
    if (cs == 1) continue;
    std::fill(to, to + D * D, T(0));
    for (int64_t i0 = 0; i0 < D; i0 += kBlock) {
      for (int64_t j0 = 0; j0 <= i0; j0 += kBlock) {
        for (int64_t i = i0; i < std::min(i0 + kBlock, D); ++i) {
          for (int64_t j = j0; j < std::min(j0 + kBlock, i + 1); ++j)
            to[i * D + j] = src[i * rs + j * cs];
        }
      }
    }
  }
}

std::tuple<Tensor, Tensor> cholesky_update(const Tensor& l, const Tensor& v, double alpha,
                                           double decay) {
  Checked check("cholesky_update");
  Size D{"D"};
  check.tensor("L", l, kReals, {D, D});
  check_update(check, v, dtype_of(l), D, alpha, decay);
  Tensor out = empty_cpu(batch_shape(l, 0), l.scalar_type());
  if (l.scalar_type() == ScalarType::Double) {
    copy_lower<double>(l, out);
  } else {
    copy_lower<float>(l, out);
  }
  Tensor info = empty_cpu(batch_shape(l, 2), ScalarType::Int);
  update_any(out, v, alpha, decay, info);
  return {out, info};
}

// --- safe_cholesky: semantics in python/cfl_ops/ops/cholesky/safe.py (its fallback)
// -------------------------

constexpr int32_t kNotFinite = -1, kIndefinite = 1;
// Their reasons: python/cfl_ops/ops/cholesky/codes.py.
constexpr double kLeast = 10, kFirstJitter = 16, kMostRounding = 1024;

// One matrix: S a S + jitter I, S = diag(a)^-1/2, factored with a jitter that grows eightfold.
template <class T>
class SafeFactor {
 public:
  SafeFactor(int64_t order, const T* a, int64_t stride, T* out)
      : n_(order), a_(a), stride_(stride), out_(out), root_(order), inverse_(order) {}

  int32_t run(double max_jitter, T* jitter) {
    *jitter = 0;
    T largest = 0;
    bool some_dead = false;
    for (int64_t i = 0; i < n_; ++i) {
      const T diagonal = a_[i * stride_ + i];
      const bool alive = diagonal > 0;
      some_dead |= !alive;
      largest = std::max(largest, alive ? diagonal : T(0));
      root_[i] = alive ? std::sqrt(diagonal) : T(1);
      inverse_[i] = alive ? 1 / root_[i] : T(0);
    }
    if (!fill(0)) {
      set_identity();
      return kNotFinite;
    }
    const double eps = std::numeric_limits<T>::epsilon();
    const double unit = eps * std::sqrt(static_cast<double>(n_));
    // In a semi-definite matrix the rest of a dead row is zero; what is there is rounding, or has
    // no business there.
    const double rounding = std::min(max_jitter, kMostRounding * eps * static_cast<double>(n_));
    const bool stray = some_dead && largest_of_dead() > static_cast<T>(rounding) * largest;

    bool failed = potrf_lower(n_, out_, n_) != 0 || !accurate(static_cast<T>(kLeast * unit));
    for (double step = kFirstJitter * unit; failed && step <= max_jitter; step *= 8) {
      fill(static_cast<T>(step));
      *jitter = static_cast<T>(step);
      failed = potrf_lower(n_, out_, n_) != 0 || !accurate(static_cast<T>(kLeast * unit));
    }
    for (int64_t i = 0; i < n_; ++i) {
      T* row = out_ + i * n_;
      for (int64_t j = 0; j <= i; ++j) row[j] *= root_[i];
      std::fill(row + i + 1, row + n_, T(0));
    }
    return failed || stray ? kIndefinite : 0;
  }

 private:
  // The scaled matrix with `shift` on its diagonal; false if the lower triangle has NaN or Inf.
  bool fill(T shift) {
    T bad = 0;  // 0 times what is not finite is NaN
    for (int64_t i = 0; i < n_; ++i) {
      const T* from = a_ + i * stride_;
      T* to = out_ + i * n_;
      const T mine = inverse_[i];
      T of_row = from[i] * 0;
      for (int64_t j = 0; j < i; ++j) {
        of_row += from[j] * 0;
        to[j] = from[j] * mine * inverse_[j];
      }
      bad += of_row;
      to[i] = 1 + (mine > 0 ? shift : T(0));
    }
    return bad == 0;
  }

  T largest_of_dead() const {
    T largest = 0;
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        if (inverse_[i] == 0 || inverse_[j] == 0) {
          largest = std::max(largest, std::abs(a_[i * stride_ + j]));
        }
      }
    }
    return largest;
  }

  // Whether the least eigenvalue of the scaled matrix is above `least`, so that rounding leaves the
  // factor and the inverse the digits that kLeast says. Three steps of inverse iteration, from the
  // least pivot and from a vector with a part in all directions; where a first, quick estimate is
  // far from it, none.
  bool accurate(T least) {
    int64_t at = 0;
    for (int64_t i = 1; i < n_; ++i) {
      if (!(out_[i * n_ + i] >= out_[at * n_ + at])) at = i;
    }
    const T pivot = n_ ? out_[at * n_ + at] * out_[at * n_ + at] : T(1);
    if (!(pivot > least)) return false;
    if (pivot > T(1e4) * least && quick_size() * least < 0.1) return true;
    vector_.assign(2 * n_, T(0));
    vector_[2 * at] = 1;
    for (int64_t i = 0; i < n_; ++i) {
      vector_[2 * i + 1] = (i % 2 ? -1 : 1) * (1 + static_cast<T>(i) / n_);
    }
    normalise(1);
    double size = 0;
    for (int step = 0; step < 3; ++step) {
      potrs_lower(n_, 2, out_, n_, vector_.data(), 2);
      size = std::max(normalise(0), normalise(1));
    }
    return size * least < 1;
  }

  // About |A^-1|, or more: |y|^2 of L y = g, where the signs of g are chosen so that y grows.
  double quick_size() {
    vector_.assign(n_, T(0));
    double size = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const T sum = kernel_.dot(out_ + i * n_, vector_.data(), i);
      const T y = (sum > 0 ? -1 - sum : 1 - sum) / out_[i * n_ + i];
      vector_[i] = y;
      size += static_cast<double>(y) * y;
    }
    return size;
  }

  // The length of one of the two vectors, which is 1 then.
  double normalise(int which) {
    double size = 0;
    for (int64_t i = which; i < 2 * n_; i += 2)
      size += static_cast<double>(vector_[i]) * vector_[i];
    size = std::sqrt(size);
    for (int64_t i = which; i < 2 * n_; i += 2) vector_[i] = static_cast<T>(vector_[i] / size);
    return size;
  }

  void set_identity() {
    std::fill(out_, out_ + n_ * n_, T(0));
    for (int64_t i = 0; i < n_; ++i) out_[i * n_ + i] = 1;
  }

  int64_t n_;
  const T* a_;
  int64_t stride_;
  T* out_;
  std::vector<T> root_, inverse_, vector_;
  const CholeskyKernel<T>& kernel_ = cholesky_kernel<T>();
};

template <class T>
void safe_batch(const Tensor& a, double max_jitter, const Tensor& out, const Tensor& jitter,
                const Tensor& info) {
  const int64_t order = a.size(a.dim() - 1), count = product(batch_shape(a, 2));
  const Batched from(a, 2);
  T* to = static_cast<T*>(out.data_ptr());
  T* jitters = static_cast<T*>(jitter.data_ptr());
  int32_t* codes = static_cast<int32_t*>(info.data_ptr());
  const int64_t stride = a.stride(a.dim() - 2);
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      codes[i] = SafeFactor<T>(order, from.at<T>(i), stride, to + i * order * order)
                     .run(max_jitter, jitters + i);
    }
  };
  if (count == 1 || order == 0) {
    run(0, count);  // LAPACK has the threads to itself
  } else {
    torch::stable::parallel_for(0, count,
                                std::max<int64_t>(1, 200000 / (order * order * order + 1)), run);
  }
}

std::tuple<Tensor, Tensor, Tensor> safe_cholesky(const Tensor& a, double max_jitter) {
  Checked check("safe_cholesky");
  Size D{"D"};
  check.tensor("a", a, kReals, {D, D});
  check.number("max_jitter", max_jitter, 0);
  const int64_t dims = a.dim();
  const Tensor rows =
      a.stride(dims - 1) == 1 || a.size(dims - 1) <= 1 ? a : torch::stable::contiguous(a);
  Tensor out = empty_cpu(batch_shape(a, 0), a.scalar_type());
  Tensor jitter = empty_cpu(batch_shape(a, 2), a.scalar_type());
  Tensor info = empty_cpu(batch_shape(a, 2), ScalarType::Int);
  if (a.scalar_type() == ScalarType::Double) {
    safe_batch<double>(rows, max_jitter, out, jitter, info);
  } else {
    safe_batch<float>(rows, max_jitter, out, jitter, info);
  }
  return {out, jitter, info};
}

}  // namespace
}  // namespace cfl::cpu

STABLE_TORCH_LIBRARY_IMPL(cfl_ops, CPU, m) {
  m.impl("cholesky_update", TORCH_BOX(&cfl::cpu::cholesky_update));
  m.impl("cholesky_update_", TORCH_BOX(&cfl::cpu::cholesky_update_));
  if (!cfl::cpu::blas_available()) return;  // the Python fallback serves instead
  m.impl("safe_cholesky", TORCH_BOX(&cfl::cpu::safe_cholesky));
}
