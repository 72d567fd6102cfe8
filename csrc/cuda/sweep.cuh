// Kernels of the sweep. Every sum has an order that follows from the shapes: no atomics.
#pragma once
#include "cuda/sweep_criterion.cuh"
#include "cuda/sweep_norm.cuh"
#include "cuda/sweep_product.cuh"
#include "cuda/sweep_update.cuh"

namespace fastdni::cuda {

inline __global__ void sweep_write_kernel(const SweepBytes bytes, uint32_t* to, int words) {
  for (int i = threadIdx.x; i < words; i += kSweepThreads) to[i] = bytes.words[i];
}

// Instructions [first, last) of the program, on the rows of this block; in a cluster, on those of
// all of its blocks.
template <Products products, class T>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks<T>)
    sweep_rows_kernel(const SweepStep<T> step, int first, int last, bool cluster) {
  for (int i = first; i < last; ++i) {
    const Instruction& op = step.instructions[i];
    if (op.stage >= 0 && !step.active.has(op.stage)) continue;
    switch (op.op) {
      case Op::product:
        run_product<products>(step, op);
        break;
      case Op::criterion:
        run_criterion(step, op);
        break;
      case Op::moments:
      case Op::gradient_moments:
        run_moments(step, op);
        break;
      default:
        run_normalize(step, op);
    }
    // What has been written is there for all who work on these rows.
    if (cluster) {
      cluster_barrier();
    } else {
      __syncthreads();
    }
  }
}

}  // namespace fastdni::cuda
