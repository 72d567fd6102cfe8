// Between torch and the CUDA launchers, for a torch with or without CUDA.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <optional>

#include "ops/tensor.h"

// torch declares it only in CUDA builds. Weak, so that this extension also links and loads beside a
// CPU torch, where no CUDA tensor can ever reach it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastdni::cuda {

// The device of a tensor, for as long as this lives, and its current stream. In a build for tests
// that is the CPU.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) {
    if (tensor.is_cpu()) return;
    FASTDNI_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fastdni: this torch has no CUDA");
    guard_.emplace(tensor.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

// Multiply-adds of a product from which on torch's library makes it: a block of ours reads all of
// a weight for few rows. Estimated, not measured. FASTDNI_LIBRARY_FROM is for tests.
inline int64_t library_from() {
  constexpr int64_t kLibraryFrom = int64_t{3} << 26;
  const char* asked = std::getenv("FASTDNI_LIBRARY_FROM");
  return asked == nullptr ? kLibraryFrom : std::atoll(asked);
}

inline void check(const char* op, cudaError_t error) {
  FASTDNI_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace fastdni::cuda
