// Stands for CUDA's header of the same name when kernels are compiled for the host: as much of the
// vocabulary as the kernels use, spelled with simt.h.
#pragma once
#include "simt.h"

#define __global__
#define __device__
#define __launch_bounds__(...)

// The address of a variable per declaration (and per instantiation) tells the arrays of a block
// apart.
#define FASTDNI_SHARED(type, name, count) \
  static const char name##_declaration{}; \
  type* const name = simt::shared_array<type>(&name##_declaration, count)

inline void __syncthreads(simt::Where where = simt::Where::current()) {
  simt::block_barrier(where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance,
                  simt::Where where = simt::Where::current()) {
  return simt::exchange(mask, value, simt::current->lane ^ distance, where);
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  simt::launch(config->gridDim, config->blockDim, [&] { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
