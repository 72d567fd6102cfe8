// Kernels of the sweep. Every sum has an order that follows from the shapes: no atomics.
#pragma once
#include "cuda/kernels/sweep_criterion.cuh"
#include "cuda/kernels/sweep_norm.cuh"
#include "cuda/kernels/sweep_product.cuh"
#include "cuda/kernels/sweep_update.cuh"

namespace fastdni::cuda {

inline __global__ void sweep_write_kernel(const SweepBytes bytes, uint32_t* to, int words) {
  for (int i = threadIdx.x; i < words; i += kSweepThreads) to[i] = bytes.words[i];
}

template <Precision precision, class T>
__device__ void run(const SweepStep<T>& step, const Instruction& op, int tile) {
  switch (op.op) {
    case Op::product:
      return run_product<precision>(step, op, tile);
    case Op::criterion:
      return run_criterion(step, op);
    case Op::moments:
    case Op::gradient_moments:
      return run_moments(step, op, tile);
    default:
      return run_normalize(step, op, tile);
  }
}

// Instructions [first, last) of the program, on the rows of this block. The blocks of the same rows
// (a cluster, or those of a launch of one phase) share the tiles among them.
template <Precision precision, class T>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks<T>)
    sweep_rows_kernel(const SweepStep<T> step, int first, int last, bool cluster) {
  const Instruction* op = step.instructions + first;
  while (op < step.instructions + last) {
    int tile = blockIdx.y;
    do {
      if (op->stage >= 0 && !step.active.has(op->stage)) continue;
      for (; tile < op->tiles(); tile += gridDim.y) run<precision>(step, *op, tile);
      tile -= op->tiles();
    } while (++op < step.instructions + last && op[0].phase == op[-1].phase);
    // What has been written is there for all who work on these rows.
    if (cluster) {
      cluster_barrier();
    } else {
      __syncthreads();
    }
  }
}

}  // namespace fastdni::cuda
