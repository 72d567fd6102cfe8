// The shape of a kernel launch, known before any CUDA call.
#pragma once
#include <cstdint>

namespace fastdni::cuda {

struct LaunchPlan {
  int64_t blocks;
  int threads;            // per block
  int64_t columns = 1;    // blocks in the grid's second direction
  bool clusters = false;  // whether those of one column make a cluster
};

}  // namespace fastdni::cuda
