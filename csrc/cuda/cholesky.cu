// The launchers of cholesky_kernel.cuh.
#include "cuda/cholesky.cuh"
#include "cuda/cholesky_kernel.cuh"
#include "cuda/launch.cuh"

namespace cfl::cuda {
namespace {

template <class T, int kRank>
cudaError_t launch_rank(const CholeskyUpdateArgs& a, cudaStream_t stream) {
  const int64_t blocks = a.batch * divide_up(a.n, kPanel);
  if (blocks == 0) return cudaSuccess;
  return launch_threads(&cholesky_update_kernel<T, kRank>, blocks, kPanel, 0, stream, a.n, a.rank,
                        static_cast<const T*>(a.from), a.from_batch_stride, a.from_row_stride,
                        a.from_col_stride, static_cast<const T*>(a.vectors), a.vector_batch_stride,
                        a.vector_row_stride, a.vector_stride, static_cast<T>(a.scale_l),
                        static_cast<T>(a.scale_v), static_cast<int>(a.check),
                        static_cast<int>(a.down), static_cast<T>(a.lost), static_cast<T*>(a.to),
                        static_cast<T*>(a.reflectors), a.flags, a.ticket, a.found);
}

template <class T>
cudaError_t launch_update(const CholeskyUpdateArgs& a, cudaStream_t stream) {
  if (a.rank <= 1) return launch_rank<T, 1>(a, stream);
  if (a.rank <= 4) return launch_rank<T, 4>(a, stream);
  if (a.rank <= 16) return launch_rank<T, 16>(a, stream);
  if constexpr (sizeof(T) == 4) {
    if (a.rank <= 32) return launch_rank<T, 32>(a, stream);
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch_choose(const CholeskyChooseArgs& a, cudaStream_t stream) {
  const int64_t each =
      a.n <= 128 ? least<int64_t>(1, a.n) : least<int64_t>(1024, divide_up(a.n, kWarps));
  if (a.batch * each == 0) return cudaSuccess;
  return launch(&cholesky_choose_kernel<T>, a.batch * each, 0, stream, each, a.n,
                static_cast<const T*>(a.from), a.from_batch_stride, a.from_row_stride,
                a.from_col_stride, static_cast<T*>(a.to), a.to_batch_stride, a.to_row_stride,
                a.to_col_stride, a.found, a.passes, a.batch, static_cast<int>(a.failed), a.info);
}

}  // namespace

int64_t cholesky_panel() { return kPanel; }
int64_t cholesky_reflector(int64_t rank, bool wide) {
  if (rank <= 1) return kReflector<1>;
  if (rank <= 4) return kReflector<4>;
  if (rank <= 16) return kReflector<16>;
  return rank <= 32 && !wide ? kReflector<32> : 0;
}

cudaError_t cholesky_update(const CholeskyUpdateArgs& a, cudaStream_t stream) {
  return a.wide ? launch_update<double>(a, stream) : launch_update<float>(a, stream);
}

cudaError_t cholesky_choose(const CholeskyChooseArgs& a, cudaStream_t stream) {
  return a.wide ? launch_choose<double>(a, stream) : launch_choose<float>(a, stream);
}

}  // namespace cfl::cuda
