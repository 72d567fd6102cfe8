// Sums over a block in an order that depends on nothing but its number of threads.
#pragma once
#include "cuda/kernels/device.cuh"

namespace fastdni::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over kLanes neighbours of a warp, which every lane of it takes part in.
template <int kLanes = kWarpSize, class T>
__device__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// The sum of every thread's value; complete in the first warp only. Every thread of a
// one-dimensional block of kThreads takes part. A second call in one kernel needs a __syncthreads()
// before it: the first warp may still be reading what the first call left in shared memory.
template <int kThreads, class T>
__device__ T block_sum(T value) {
  constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kThreads % kWarpSize == 0 && kWarps <= kWarpSize);
  FASTDNI_SHARED(T, warp_sums, kWarps);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;

  value = warp_sum(value);
  if (lane == 0) warp_sums[warp] = value;
  __syncthreads();
  if (warp == 0) value = warp_sum(lane < kWarps ? warp_sums[lane] : T(0));
  return value;
}

}  // namespace fastdni::cuda
