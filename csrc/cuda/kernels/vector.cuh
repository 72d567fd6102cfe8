// Several elements moved at once.
#pragma once
#include <cstdint>

#include "cuda/kernels/device.cuh"

namespace fastdni::cuda {

// As many elements of T as one 16-byte load brings.
template <class T>
constexpr int kVectorWidth = 16 / sizeof(T);

template <class T, int kWidth>
struct alignas(16) Vector {
  T values[kWidth];
};

inline __device__ bool is_vector_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Vector<float, 4>) == 0;
}

// source[begin...]. Without kWhole the vector may be unaligned and reach past the end, at n, where
// it reads as zero.
template <bool kWhole, int kWidth, class T>
__device__ Vector<T, kWidth> load(const T* source, int64_t begin, int64_t n) {
  if constexpr (kWhole) {
    return *reinterpret_cast<const Vector<T, kWidth>*>(source + begin);
  } else {
    Vector<T, kWidth> vector;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) vector.values[k] = begin + k < n ? source[begin + k] : T(0);
    return vector;
  }
}

template <bool kWhole, class T, int kWidth>
__device__ void store(T* target, int64_t begin, int64_t n, const Vector<T, kWidth>& vector) {
  if constexpr (kWhole) {
    *reinterpret_cast<Vector<T, kWidth>*>(target + begin) = vector;
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (begin + k < n) target[begin + k] = vector.values[k];
    }
  }
}

}  // namespace fastdni::cuda
