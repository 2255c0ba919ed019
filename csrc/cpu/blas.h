// The BLAS that torch itself computes with, called without a trip through the dispatcher.
//
// libtorch_cpu (or the OpenBLAS it depends on) exports the Fortran symbols with 32-bit integers.
// They are looked up at load time, so the extension links to no BLAS of its own and shares torch's
// thread settings.
#pragma once

#include <cstdint>

namespace cfl::cpu {

// True if every routine below was found. The ops that need BLAS register their CPU kernels only
// then.
bool blas_available();

// Row-major C (m x n) = alpha op(A) op(B) + beta C, op(A) m x k, op(B) k x n; ld* are row strides.
void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
          int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc);
void gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, double alpha,
          const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c,
          int64_t ldc);

// The sum of a_i b_i.
float dot(int64_t n, const float* a, const float* b);
double dot(int64_t n, const double* a, const double* b);

// Lower Cholesky factor in place of the row-major symmetric a (n x n), the lower triangle read and
// written. Returns LAPACK's info: 0, or the order of the first leading minor that is not positive
// definite.
int64_t potrf_lower(int64_t n, float* a, int64_t lda);
int64_t potrf_lower(int64_t n, double* a, int64_t lda);

// Row-major B (n x k) <- (L L^T)^-1 B, L from potrf_lower.
void potrs_lower(int64_t n, int64_t k, const float* l, int64_t ldl, float* b, int64_t ldb);
void potrs_lower(int64_t n, int64_t k, const double* l, int64_t ldl, double* b, int64_t ldb);

// Eigenvalues (rising) and, in the rows of a, eigenvectors of the symmetric a (n x n, dense).
// Returns LAPACK's info.
int64_t eigh(int64_t n, double* a, double* values);

// Row-major B (k x n) <- B (L L^T)^-1.
void potrs_lower_right(int64_t n, int64_t k, const float* l, int64_t ldl, float* b, int64_t ldb);
void potrs_lower_right(int64_t n, int64_t k, const double* l, int64_t ldl, double* b, int64_t ldb);

}  // namespace cfl::cpu
