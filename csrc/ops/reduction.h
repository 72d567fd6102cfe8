// The two ways a squared error becomes a loss.
#pragma once
#include "ops/tensor.h"

namespace fastdni {

// What sum(e^2) is divided by: the batch size ("batchmean", the synthesis loss of the paper) or the
// number of elements ("mean"). An empty batch divides by one, so that its loss is 0, not NaN.
inline double reduction_divisor(const char* op, const std::string& reduction, const Tensor& error) {
  FASTDNI_CHECK(reduction == "batchmean" || reduction == "mean", op,
                ": reduction must be \"batchmean\" or \"mean\", got \"", reduction, "\"");
  const int64_t batch = error.dim() == 0 ? 1 : error.size(0);
  return static_cast<double>(
      std::max(reduction == "batchmean" ? batch : error.numel(), int64_t{1}));
}

}  // namespace fastdni
