// The argument rules of regression_loss, for every device.
#pragma once
#include "ops/tensor.h"

namespace fastdni {

inline constexpr const char* kRegressionLoss = "regression_loss";

void check_regression_loss(const Tensor& prediction, const Tensor& target,
                           const std::string& reduction);

// Where a kernel does it: those rules, and the dtypes that there are kernels for.
void check_regression_loss_kernel(const Tensor& prediction, const Tensor& target,
                                  const std::string& reduction);

}  // namespace fastdni
