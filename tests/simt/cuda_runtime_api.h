// Stands for CUDA's header of the same name: the types that a launcher's declaration needs.
#pragma once

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0 };

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
