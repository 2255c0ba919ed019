// The launchers of solve_kernel.cuh.
#include "cuda/launch.cuh"
#include "cuda/solve.cuh"
#include "cuda/solve_kernel.cuh"

namespace cfl::cuda {
namespace {

template <class T, class A, int kOrder>
cudaError_t launch_small(const SolveArgs& a, const int* only, int* again, cudaStream_t stream) {
  using Small = SmallSolve<A, kOrder>;
  const int64_t pieces = most<int64_t>(1, divide_up(a.columns, kColumnsPerWarp));
  int64_t blocks = divide_up(a.batch * pieces, Small::kWarps * Small::Layout::kSystems);
  if (sizeof(T) != sizeof(A)) blocks = least<int64_t>(blocks, kSecondLookBlocks);
  return launch_threads(&solve_small_kernel<T, A, kOrder>, blocks, Small::kWarps * kLaneCount,
                        Small::kShared, stream, static_cast<const T*>(a.matrices),
                        static_cast<const T*>(a.rights), a.lam, a.shift, a.batch,
                        static_cast<int>(a.n), a.columns, a.tolerance, only,
                        static_cast<T*>(a.solutions), a.info, again);
}

template <class T, class A>
cudaError_t launch_order(const SolveArgs& a, const int* only, int* again, cudaStream_t stream) {
  if (a.batch == 0) return cudaSuccess;
  if (a.n <= 8) return launch_small<T, A, 8>(a, only, again, stream);
  if (a.n <= 16) return launch_small<T, A, 16>(a, only, again, stream);
  if (a.n <= 32) return launch_small<T, A, 32>(a, only, again, stream);
  if (a.n <= 64) return launch_small<T, A, 64>(a, only, again, stream);
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch_careful(const SolveArgs& a, cudaStream_t stream) {
  if (a.n > kCareful) return cudaErrorInvalidValue;
  if (a.batch == 0) return cudaSuccess;
  return launch_threads(&solve_careful_kernel<T>, least<int64_t>(a.batch, kSecondLookBlocks),
                        kCareful, 0, stream, static_cast<const T*>(a.matrices),
                        static_cast<const T*>(a.rights), a.lam, a.shift, a.batch,
                        static_cast<int>(a.n), a.columns, static_cast<T*>(a.solutions), a.info);
}

template <class T>
cudaError_t launch_tiled(const SolveArgs& a, const TiledMemory& m, cudaStream_t stream) {
  const int64_t tiles = divide_up(a.n, kSide), right_tiles = divide_up(a.columns, kSide);
  const int64_t blocks = a.batch * (tiles * (tiles + 1) / 2 + 2 * tiles * right_tiles);
  if (blocks == 0) return cudaSuccess;
  return launch(&solve_tiled_kernel<T>, blocks, 0, stream, static_cast<const T*>(a.matrices),
                static_cast<const T*>(a.rights), a.lam, a.shift, a.batch, a.n, a.columns,
                a.tolerance, m.work, m.inverse, m.flags, m.ticket, static_cast<T*>(a.solutions),
                m.factors, a.info);
}

template <class T, int kOrder>
cudaError_t launch_pinv(const SmallPinvArgs& a, cudaStream_t stream) {
  using Small = SmallSolve<double, kOrder>;
  const int64_t blocks = divide_up(a.batch, Small::kWarps * Small::Layout::kSystems);
  if (blocks == 0) return cudaSuccess;
  if (a.rows * a.n > 0x7fffffff) return cudaErrorInvalidValue;
  return launch_threads(&solve_pinv_kernel<T, kOrder>, blocks, Small::kWarps * kLaneCount,
                        Small::kPinvShared, stream, static_cast<const T*>(a.matrices), a.batch,
                        static_cast<int>(a.rows), static_cast<int>(a.n), static_cast<int>(a.wide),
                        a.limit, a.tolerance, static_cast<T*>(a.results), a.info);
}

template <class T>
cudaError_t launch_pinv_order(const SmallPinvArgs& a, cudaStream_t stream) {
  if (a.n <= 8) return launch_pinv<T, 8>(a, stream);
  if (a.n <= 16) return launch_pinv<T, 16>(a, stream);
  if (a.n <= 32) return launch_pinv<T, 32>(a, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t solve_pinv(const SmallPinvArgs& a, cudaStream_t stream) {
  return a.dtype == Real::kF64 ? launch_pinv_order<double>(a, stream)
                               : launch_pinv_order<float>(a, stream);
}

cudaError_t solve_small(const SolveArgs& a, const int* only, int* again, cudaStream_t stream) {
  if (a.dtype == Real::kF64) return launch_order<double, double>(a, only, again, stream);
  if (a.compute == Real::kF64) return launch_order<float, double>(a, only, again, stream);
  return launch_order<float, float>(a, only, again, stream);
}

cudaError_t solve_careful(const SolveArgs& a, cudaStream_t stream) {
  return a.dtype == Real::kF64 ? launch_careful<double>(a, stream)
                               : launch_careful<float>(a, stream);
}

int64_t solve_side() { return kSide; }

cudaError_t solve_tiled(const SolveArgs& a, const TiledMemory& m, cudaStream_t stream) {
  return a.dtype == Real::kF64 ? launch_tiled<double>(a, m, stream)
                               : launch_tiled<float>(a, m, stream);
}

}  // namespace cfl::cuda
