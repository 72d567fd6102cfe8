// Between torch and the CUDA launchers, for a torch with or without CUDA.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops/tensor.h"

// torch declares it only in CUDA builds. Weak, so that this extension also links and loads beside a
// CPU torch, where no CUDA tensor can ever reach it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastdni::cuda {

inline cudaStream_t current_stream(const Tensor& tensor) {
  FASTDNI_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fastdni: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check(const char* op, cudaError_t error) {
  FASTDNI_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace fastdni::cuda
