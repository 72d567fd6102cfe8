// error = prediction - target; loss = sum(error^2) / divisor
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "common/scalar.h"
#include "cuda/kernels/launch_plan.h"

namespace fastdni::cuda {

template <class T>
struct RegressionLoss {
  const T* __restrict__ prediction;        // (n,)
  const T* __restrict__ target;            // (n,)
  accumulate_t<T>* __restrict__ error;     // (n,)
  accumulate_t<T>* __restrict__ loss;      // ()
  accumulate_t<T>* __restrict__ partials;  // (plan.blocks,) untouched when that is one
  int64_t n;
  double divisor;  // > 0
};

// The order of the sum follows from these constants and n alone, never from the device.
//
// Four blocks of 512 fill a multiprocessor of 2048 threads, at up to 32 registers a thread.
constexpr int kRegressionLossThreads = 512;
// Eight elements a thread: one 16-byte load of bfloat16, four of double, all in flight at once.
constexpr int64_t kRegressionLossChunk = 8 * kRegressionLossThreads;
// Up to here one block does it alone: it needs about 1 us a chunk, a second launch about 3 us more
// (estimates, not measured).
constexpr int64_t kRegressionLossOneBlock = 4 * kRegressionLossChunk;
// One partial sum for each thread of the block that adds them up; about one wave on 132
// multiprocessors.
constexpr int64_t kRegressionLossMaxBlocks = kRegressionLossThreads;

inline LaunchPlan regression_loss_plan(int64_t n) {
  const int64_t chunks = (n + kRegressionLossChunk - 1) / kRegressionLossChunk;
  const int64_t blocks =
      n <= kRegressionLossOneBlock ? 1 : std::min(chunks, kRegressionLossMaxBlocks);
  return {blocks, kRegressionLossThreads};
}

// For float, double and bfloat16. One launch when the plan has one block, otherwise two.
template <class T>
cudaError_t launch_regression_loss(const RegressionLoss<T>& args, cudaStream_t stream);

}  // namespace fastdni::cuda
