// Launches a kernel. By cudaLaunchKernelEx and not by <<<>>>: a plain C++ call, so that the host
// run (tests/simt) proves the launchers together with their kernels.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/kernels/launch_plan.h"

namespace fastdni::cuda {

// A plan as the runtime takes it; `attribute` must outlive it.
inline cudaLaunchConfig_t configured(LaunchPlan plan, cudaStream_t stream,
                                     cudaLaunchAttribute& attribute) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.columns));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.stream = stream;
  if (plan.clusters) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = attribute.val.clusterDim.z = 1;
    attribute.val.clusterDim.y = config.gridDim.y;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return config;
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), LaunchPlan plan, cudaStream_t stream,
                   const std::type_identity_t<Parameters>&... arguments) {
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = configured(plan, stream, attribute);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  // A refused launch must not be blamed on whoever asks next.
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// What the code of a kernel that the current GPU runs was compiled for: 90 for sm_90; 0 where there
// is none.
template <class... Parameters>
int code_architecture(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  return cudaGetLastError() == cudaSuccess ? attributes.ptxVersion : 0;
}

// How many clusters of such a launch the current GPU holds at a time.
template <class... Parameters>
int most_clusters(void (*kernel)(Parameters...), LaunchPlan plan) {
  cudaLaunchAttribute attribute{};
  const cudaLaunchConfig_t config = configured(plan, nullptr, attribute);
  int clusters = 0;
  cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  return cudaGetLastError() == cudaSuccess ? clusters : 0;
}

}  // namespace fastdni::cuda
