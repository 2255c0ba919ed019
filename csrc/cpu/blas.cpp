#include "cpu/blas.h"

#include <dlfcn.h>

#include <stdexcept>
#include <vector>

namespace cfl::cpu {
namespace {

using Int = int32_t;  // LP64, which every torch build uses

template <class T>
struct Routines {
  using Gemm = void (*)(const char*, const char*, const Int*, const Int*, const Int*, const T*,
                        const T*, const Int*, const T*, const Int*, const T*, T*, const Int*);
  using Potrf = void (*)(const char*, const Int*, T*, const Int*, Int*);
  using Trsm = void (*)(const char*, const char*, const char*, const char*, const Int*, const Int*,
                        const T*, const T*, const Int*, T*, const Int*);
  using Dot = T (*)(const Int*, const T*, const Int*, const T*, const Int*);
  Gemm gemm = nullptr;
  Potrf potrf = nullptr;
  Trsm trsm = nullptr;
  Dot dot = nullptr;
  bool complete() const { return gemm && potrf && trsm && dot; }
};

struct Library {
  using Syevd = void (*)(const char*, const char*, const Int*, double*, const Int*, double*,
                         double*, const Int*, Int*, const Int*, Int*);
  Routines<float> f32;
  Routines<double> f64;
  Syevd syevd = nullptr;

  Library() {
    // RTLD_NOLOAD: only a library that is already in the process, hence the one torch uses. A
    // lookup by handle searches its dependencies too, which is where an OpenBLAS build keeps the
    // symbols.
    void* handle = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) return;
    auto find = [&](const char* name, auto& fn) {
      fn = reinterpret_cast<std::remove_reference_t<decltype(fn)>>(dlsym(handle, name));
    };
    find("sgemm_", f32.gemm);
    find("spotrf_", f32.potrf);
    find("strsm_", f32.trsm);
    find("sdot_", f32.dot);
    find("dgemm_", f64.gemm);
    find("dpotrf_", f64.potrf);
    find("dtrsm_", f64.trsm);
    find("ddot_", f64.dot);
    find("dsyevd_", syevd);
  }
};

const Library& library() {
  static const Library instance;
  return instance;
}

template <class T>
const Routines<T>& routines();
template <>
const Routines<float>& routines<float>() {
  return library().f32;
}
template <>
const Routines<double>& routines<double>() {
  return library().f64;
}

Int narrow(int64_t value) {
  if (value > INT32_MAX)
    throw std::overflow_error("cfl_ops: a matrix side exceeds BLAS's 2^31 - 1");
  return static_cast<Int>(value);
}
Int leading(int64_t value) { return narrow(value > 0 ? value : 1); }

template <class T>
void gemm_impl(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, T alpha, const T* a,
               int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  if (m == 0 || n == 0) return;
  // Row-major C = A B is column-major C^T = B^T A^T.
  const Int mm = narrow(n), nn = narrow(m), kk = narrow(k);
  const Int la = leading(ldb), lb = leading(lda), lc = leading(ldc);
  const char ta = trans_b ? 'T' : 'N', tb = trans_a ? 'T' : 'N';
  routines<T>().gemm(&ta, &tb, &mm, &nn, &kk, &alpha, b, &la, a, &lb, &beta, c, &lc);
}

template <class T>
T dot_impl(int64_t n, const T* a, const T* b) {
  const Int count = narrow(n), one = 1;
  return routines<T>().dot(&count, a, &one, b, &one);
}

template <class T>
int64_t potrf_impl(int64_t n, T* a, int64_t lda) {
  if (n == 0) return 0;
  const Int nn = narrow(n), ld = leading(lda);
  const char uplo = 'U';  // the row-major lower triangle is the column-major upper one
  Int info = 0;
  routines<T>().potrf(&uplo, &nn, a, &ld, &info);
  return info;
}

// Column-major U = L^T. solve_left: B^T (k x n column-major view of row-major n x k is k x n) etc.
template <class T>
void trsm(char side, char trans, int64_t rows, int64_t cols, const T* u, int64_t ldu, T* b,
          int64_t ldb) {
  const Int m = narrow(rows), n = narrow(cols), la = leading(ldu), lb = leading(ldb);
  const char uplo = 'U', diag = 'N';
  const T one = 1;
  routines<T>().trsm(&side, &uplo, &trans, &diag, &m, &n, &one, u, &la, b, &lb);
}

template <class T>
void potrs_left_impl(int64_t n, int64_t k, const T* l, int64_t ldl, T* b, int64_t ldb) {
  if (n == 0 || k == 0) return;
  // Row-major B (n x k) is column-major B^T (k x n): B^T <- B^T (U^T U)^-1 = (B^T U^-1) U^-T.
  trsm('R', 'N', k, n, l, ldl, b, ldb);
  trsm('R', 'T', k, n, l, ldl, b, ldb);
}

template <class T>
void potrs_right_impl(int64_t n, int64_t k, const T* l, int64_t ldl, T* b, int64_t ldb) {
  if (n == 0 || k == 0) return;
  // Row-major B (k x n) is column-major B^T (n x k): B^T <- (U^T U)^-1 B^T = U^-1 (U^-T B^T).
  trsm('L', 'T', n, k, l, ldl, b, ldb);
  trsm('L', 'N', n, k, l, ldl, b, ldb);
}

}  // namespace

bool blas_available() {
  return library().f32.complete() && library().f64.complete() && library().syevd;
}

int64_t eigh(int64_t n, double* a, double* values) {
  if (n == 0) return 0;
  const Int nn = narrow(n), integers = narrow(3 + 5 * n), numbers = narrow(1 + 6 * n + 2 * n * n);
  std::vector<double> work(numbers);
  std::vector<Int> integer_work(integers);
  const char job = 'V', uplo = 'L';
  Int info = 0;
  // The columns of the column-major result are the rows of the row-major one.
  library().syevd(&job, &uplo, &nn, a, &nn, values, work.data(), &numbers, integer_work.data(),
                  &integers, &info);
  return info;
}

#define CFL_DEFINE(T)                                                                         \
  void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, T alpha, const T* a, \
            int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {                \
    gemm_impl(trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);                \
  }                                                                                           \
  T dot(int64_t n, const T* a, const T* b) { return dot_impl(n, a, b); }                      \
  int64_t potrf_lower(int64_t n, T* a, int64_t lda) { return potrf_impl(n, a, lda); }         \
  void potrs_lower(int64_t n, int64_t k, const T* l, int64_t ldl, T* b, int64_t ldb) {        \
    potrs_left_impl(n, k, l, ldl, b, ldb);                                                    \
  }                                                                                           \
  void potrs_lower_right(int64_t n, int64_t k, const T* l, int64_t ldl, T* b, int64_t ldb) {  \
    potrs_right_impl(n, k, l, ldl, b, ldb);                                                   \
  }
CFL_DEFINE(float)
CFL_DEFINE(double)
#undef CFL_DEFINE

}  // namespace cfl::cpu
