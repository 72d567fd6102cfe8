// What the sweep's kernels share: how a block's threads divide rows among them.
#pragma once
#include "cuda/kernels/sweep.h"
#include "cuda/kernels/tile_product.cuh"

namespace fastdni::cuda {

constexpr int kSweepLanes = kTileLanes;  // threads of a row
static_assert(kSweepThreads == kTileThreads && kSweepRows == kTileRows);
static_assert(kSweepColumns == kTileColumns && kUpdateColumns == kTileColumns);
static_assert(kMomentColumns == kSweepThreads);
// Blocks on a multiprocessor at least: 128 registers a thread, 255 for float64, which is for
// proofs.
template <class T>
constexpr int kSweepBlocks = sizeof(T) == sizeof(float) ? 2 : 1;

// What a thread of a block of rows works on: row `row` of the batch, in every tile of columns the
// columns lane, lane + kSweepLanes, ...
struct RowThread {
  int row;
  int lane;
  bool inside;  // a row of the batch

  __device__ int64_t begin(int columns) const { return static_cast<int64_t>(row) * columns; }
};

template <class T>
__device__ RowThread row_thread(const SweepStep<T>& step) {
  const int row = blockIdx.x * kSweepRows + threadIdx.x / kSweepLanes;
  return {row, static_cast<int>(threadIdx.x % kSweepLanes), row < step.batch};
}

}  // namespace fastdni::cuda
