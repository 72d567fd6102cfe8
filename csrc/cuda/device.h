// Between torch and the CUDA launchers, for a torch with or without CUDA.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <limits>
#include <optional>

#include "common/network.h"
#include "ops/tensor.h"

// torch declares it only in CUDA builds. Weak, so that this extension also links and loads beside a
// CPU torch, where no CUDA tensor can ever reach it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastdni::cuda {

// The dispatch key of these drivers. In a build for tests the kernels are compiled for the host,
// and serve the CPU's tensors.
#if defined(FASTDNI_CUDA_ON_HOST)
#define FASTDNI_CUDA_KEY CPU
constexpr bool kOnHost = true;
#else
#define FASTDNI_CUDA_KEY CUDA
constexpr bool kOnHost = false;
#endif

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
// a weight for few rows. Estimated, not measured. FASTDNI_LIBRARY_FROM is for tests, and is read
// once. The library is not asked for what it does not have: three products of TF32 in place of one,
// and products of bfloat16 with sums in more where that is not on a GPU, or in float64.
inline int64_t library_from(Precision precision, bool wide, bool on_cpu) {
  constexpr int64_t kLibraryFrom = int64_t{3} << 26;
  if (precision == Precision::tf32x3 || (precision == Precision::bfloat16 && (wide || on_cpu))) {
    return std::numeric_limits<int64_t>::max();
  }
  static const int64_t from = [] {
    const char* asked = std::getenv("FASTDNI_LIBRARY_FROM");
    return asked == nullptr ? kLibraryFrom : std::atoll(asked);
  }();
  return from;
}

inline void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or it would be blamed on whoever asks next
  fail(op, ": ", cudaGetErrorString(error));
}

// Whether what is sent to a stream becomes part of a graph.
inline bool is_captured(const char* op, cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(op, cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace fastdni::cuda
