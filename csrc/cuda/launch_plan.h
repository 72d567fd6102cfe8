// The shape of a kernel launch, known before any CUDA call.
#pragma once
#include <cstdint>

namespace fastdni::cuda {

struct LaunchPlan {
  int64_t blocks;
  int threads;  // per block
};

}  // namespace fastdni::cuda
