// Stands for csrc/cuda/kernels/ptx.cuh, where each of these is one instruction.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace fastdni::cuda {

template <class T>
T* in_global_memory(T* pointer) {
  return pointer;
}

inline float with_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

constexpr uint32_t kTf32Unread = 0x1fff;  // the bits that a tensor core does not read

inline float to_tf32(float value) {
  return value - value == 0 ? with_bits((bits_of(value) + 0x1000) & ~kTf32Unread) : value;
}

inline uint32_t pack_bfloat16(float low, float high) {
  return bfloat16(low).bits | static_cast<uint32_t>(bfloat16(high).bits) << 16;
}

// What a warp hands in for c (16, 8) += a (16, depth) b (depth, 8), put where it belongs.
struct WarpMatrices {
  float a[16][16], b[16][8];
};

inline void multiply_add_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2],
                              simt::Where where = simt::Where::current()) {
  const int g = simt::current->lane / 4, t = simt::current->lane % 4;
  const auto read = [](float value) { return with_bits(bits_of(value) & ~kTf32Unread); };
  simt::together<WarpMatrices>(
      [&](WarpMatrices& all) {
        for (int i = 0; i < 4; ++i) all.a[g + i % 2 * 8][t + i / 2 * 4] = read(a[i]);
        for (int i = 0; i < 2; ++i) all.b[t + i * 4][g] = read(b[i]);
      },
      [&](const WarpMatrices& all) {
        for (int i = 0; i < 4; ++i) {
          for (int k = 0; k < 8; ++k) c[i] += all.a[g + i / 2 * 8][k] * all.b[k][2 * t + i % 2];
        }
      },
      where);
}

inline void multiply_add_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                  simt::Where where = simt::Where::current()) {
  const int g = simt::current->lane / 4, t = simt::current->lane % 4;
  const auto half = [](uint32_t packed, int i) {
    return with_bits(i == 0 ? packed << 16 : packed & 0xffff0000u);
  };
  simt::together<WarpMatrices>(
      [&](WarpMatrices& all) {
        for (int e = 0; e < 2; ++e) {
          for (int i = 0; i < 4; ++i) {
            all.a[g + i % 2 * 8][2 * t + i / 2 * 8 + e] = half(a[i], e);
          }
          for (int i = 0; i < 2; ++i) all.b[2 * t + i * 8 + e][g] = half(b[i], e);
        }
      },
      [&](const WarpMatrices& all) {
        for (int i = 0; i < 4; ++i) {
          for (int k = 0; k < 16; ++k) c[i] += all.a[g + i / 2 * 8][k] * all.b[k][2 * t + i % 2];
        }
      },
      where);
}

inline void cluster_barrier(simt::Where where = simt::Where::current()) {
  simt::cluster_barrier(where);
}

}  // namespace fastdni::cuda
