// Launches a kernel. By cudaLaunchKernelEx and not by <<<>>>: a plain C++ call, so that the host
// run (tests/simt) proves the launchers together with their kernels.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/launch_plan.h"

namespace fastdni::cuda {

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), LaunchPlan plan, cudaStream_t stream,
                   const std::type_identity_t<Parameters>&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.columns));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  // Also clears the error: a refused launch must not be blamed on whoever asks next.
  return cudaGetLastError();
}

}  // namespace fastdni::cuda
