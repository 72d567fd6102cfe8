// Scalar types shared by the CPU and the CUDA kernels.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTDNI_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: CPU kernels are compiled once per instruction set, and an out-of-line copy made
// for one set must never be linked into another.
#define FASTDNI_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fastdni {

// bfloat16 as it lies in memory. Arithmetic happens in accumulate_t; storing rounds to nearest
// even.
struct bfloat16 {
  uint16_t bits;

  bfloat16() = default;

  FASTDNI_HOST_DEVICE explicit bfloat16(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = word + 0x7fffu + ((word >> 16) & 1u);
    bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded >> 16);
  }

  FASTDNI_HOST_DEVICE operator float() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
  }
};

// The type sums are formed in: float for bfloat16, otherwise the type itself.
template <class T>
struct Accumulate {
  using type = T;
};
template <>
struct Accumulate<bfloat16> {
  using type = float;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

FASTDNI_HOST_DEVICE float square_root(float value) { return __builtin_sqrtf(value); }
FASTDNI_HOST_DEVICE double square_root(double value) { return __builtin_sqrt(value); }

}  // namespace fastdni
