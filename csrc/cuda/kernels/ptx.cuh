// What CUDA C++ has no name for, each instruction under its own. The host run has its own version
// of this file (tests/simt/cuda/kernels/ptx.cuh).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastdni::cuda {

// The pointer, known to be one into global memory: loads need not find that out.
template <class T>
__device__ T* in_global_memory(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// Rounded to the 10 bits of mantissa that a tensor core reads: to nearest, ties away from zero.
inline __device__ float to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

// Two bfloat16 in one register.
inline __device__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// c (16, 8) += a (16, 8) b (8, 8), by a whole warp. Lane 4 g + t holds
//   a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)       b: (t, g), (t + 4, g)
//   c: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
inline __device__ void multiply_add_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// c (16, 8) += a (16, 16) b (16, 8); c as above, and of pairs that are neighbours in depth
//   a: (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8)       b: (2 t, g), (2 t + 8, g)
inline __device__ void multiply_add_bfloat16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Waits for all blocks of a cluster, and shows each what the others wrote. sm_90 and later: older
// GPUs have no clusters, and code for them is never launched with any (see `sweep_clusters`).
inline __device__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

}  // namespace fastdni::cuda
