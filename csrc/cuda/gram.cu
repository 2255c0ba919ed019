// The launcher of gram_kernel.cuh.
#include "cuda/gram.cuh"
#include "cuda/gram_kernel.cuh"
#include "cuda/launch.cuh"

namespace cfl::cuda {

int64_t gram_tiles(int64_t cols) {
  const int64_t side = divide_up(cols, kGramTile);
  return side * (side + 1) / 2;
}
int64_t gram_tile_numbers() { return kGramTile * kGramTile; }

namespace {

template <class T>
cudaError_t launch_gram(const ExactGramArgs& a, cudaStream_t stream) {
  const int64_t blocks = a.batch * gram_tiles(a.cols) * a.splits;
  if (blocks == 0) return cudaSuccess;
  return launch(&exact_gram_kernel<T>, blocks, 0, stream, static_cast<const T*>(a.x), a.rows,
                a.cols, a.x_batch_stride, a.x_row_stride, a.x_col_stride, a.weight,
                a.weight_batch_stride, a.weight_stride, a.splits, divide_up(a.rows, a.splits),
                a.parts, a.arrived, a.gram);
}

}  // namespace

cudaError_t exact_gram(const ExactGramArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case GramInput::kF16:
      return launch_gram<Half>(args, stream);
    case GramInput::kBF16:
      return launch_gram<BFloat>(args, stream);
    case GramInput::kF32:
      return launch_gram<float>(args, stream);
    default:
      return launch_gram<double>(args, stream);
  }
}

}  // namespace cfl::cuda
