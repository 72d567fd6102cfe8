// Kernels of regression_loss. One pass reads both inputs, writes the error and leaves one partial
// sum a block; the block of a second launch adds them up. No atomics: the same inputs give the same
// bits. Errors and a chunk's sums are accumulate_t<T>.
#pragma once
#include "cuda/kernels/block_reduce.cuh"
#include "cuda/kernels/regression_loss.h"
#include "cuda/kernels/vector.cuh"

namespace fastdni::cuda {

// Writes the errors of one chunk and returns this thread's share of their squares.
template <bool kWhole, class T>
__device__ accumulate_t<T> chunk_squares(const RegressionLoss<T>& args, int64_t chunk) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kVectorWidth<T>;
  constexpr int kStride = kRegressionLossThreads * kWidth;
  constexpr int kVectors = kRegressionLossChunk / kStride;
  const int64_t first = chunk * kRegressionLossChunk + threadIdx.x * kWidth;

  // Every load is under way before the first is needed.
  Vector<T, kWidth> prediction[kVectors], target[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    prediction[v] = load<kWhole, kWidth>(args.prediction, first + v * kStride, args.n);
    target[v] = load<kWhole, kWidth>(args.target, first + v * kStride, args.n);
  }
  A sum = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    Vector<A, kWidth> error;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      error.values[k] = A(prediction[v].values[k]) - A(target[v].values[k]);
      sum += error.values[k] * error.values[k];
    }
    store<kWhole>(args.error, first + v * kStride, args.n, error);
  }
  return sum;
}

// Block b takes the chunks b, b + blocks, b + 2 blocks, ...
template <class T>
__global__ void __launch_bounds__(kRegressionLossThreads)
    regression_loss_kernel(const RegressionLoss<T> args) {
  // A view of another tensor may start anywhere. The order of the sum is the same either way.
  const bool aligned = is_vector_aligned(args.prediction) && is_vector_aligned(args.target) &&
                       is_vector_aligned(args.error);
  double total = 0;  // of chunks without end
  for (int64_t chunk = blockIdx.x; chunk * kRegressionLossChunk < args.n; chunk += gridDim.x) {
    const bool whole = aligned && (chunk + 1) * kRegressionLossChunk <= args.n;
    total += whole ? chunk_squares<true>(args, chunk) : chunk_squares<false>(args, chunk);
  }

  const auto sum = block_sum<kRegressionLossThreads>(static_cast<accumulate_t<T>>(total));
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    *args.loss = sum / static_cast<accumulate_t<T>>(args.divisor);
  } else {
    args.partials[blockIdx.x] = sum;
  }
}

// One block: loss = sum(partials) / divisor.
template <class T>
__global__ void __launch_bounds__(kRegressionLossThreads)
    regression_loss_sum_kernel(const RegressionLoss<T> args, int64_t partials) {
  using A = accumulate_t<T>;
  static_assert(kRegressionLossMaxBlocks <= kRegressionLossThreads);
  const int i = threadIdx.x;
  const A sum = block_sum<kRegressionLossThreads>(i < partials ? args.partials[i] : A(0));
  if (i == 0) *args.loss = sum / static_cast<A>(args.divisor);
}

}  // namespace fastdni::cuda
