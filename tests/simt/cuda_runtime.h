// Stands for CUDA's header of the same name when kernels are compiled for the host: as much of the
// vocabulary as the kernels use, spelled with simt.h.
#pragma once
#include <cmath>
#include <functional>
#include <memory>
#include <tuple>

#include "common/scalar.h"
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

inline void __syncwarp(simt::Where where = simt::Where::current()) {
  simt::warp_barrier(~0u, where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance,
                  simt::Where where = simt::Where::current()) {
  return simt::exchange(mask, value, simt::current->lane ^ distance, where);
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// Does what is launched when its turn in the stream comes: at once, or as tests/emulated has it.
#if defined(SIMT_EMULATED)
extern "C" cudaError_t emulated_launch(cudaStream_t stream, std::function<void()>* work);
#else
inline cudaError_t emulated_launch(cudaStream_t, std::function<void()>* work) {
  (*std::unique_ptr<std::function<void()> >(work))();
  return cudaSuccess;
}
#endif

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  dim3 cluster;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& [x, y, z] = config->attrs[i].val.clusterDim;
    cluster = {x, y, z};
  }
  const auto work = [grid = config->gridDim, block = config->blockDim, cluster, kernel,
                     own = std::tuple<Parameters...>(arguments...)] {
    simt::launch(grid, block, cluster, [&] { std::apply(kernel, own); });
  };
  return emulated_launch(config->stream, new std::function<void()>(work));
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*, const cudaLaunchConfig_t*) {
  *clusters = 1;
  return cudaSuccess;
}

// Those on an H100, as far as they are asked for.
struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
