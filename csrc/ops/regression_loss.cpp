// regression_loss: error = prediction - target; loss = sum(error^2) / divisor.
#include "ops/regression_loss.h"

#include "ops/reduction.h"

namespace fastdni {

void check_regression_loss(const Tensor& prediction, const Tensor& target,
                           const std::string& reduction) {
  FASTDNI_CHECK(prediction.device() == target.device(), kRegressionLoss,
                ": target must be on prediction's device");
  FASTDNI_CHECK(shape_of(prediction) == shape_of(target), kRegressionLoss,
                ": target must have prediction's shape ", to_string(shape_of(prediction)), ", got ",
                to_string(shape_of(target)));
  FASTDNI_CHECK(prediction.scalar_type() == target.scalar_type(), kRegressionLoss,
                ": target must have prediction's dtype ", to_string(prediction.scalar_type()),
                ", got ", to_string(target.scalar_type()));
  reduction_divisor(kRegressionLoss, reduction, prediction);
}

void check_regression_loss_kernel(const Tensor& prediction, const Tensor& target,
                                  const std::string& reduction) {
  check_regression_loss(prediction, target, reduction);
  FASTDNI_CHECK(has_kernel(prediction.scalar_type()), kRegressionLoss,
                ": prediction must be float32, float64 or bfloat16, got ",
                to_string(prediction.scalar_type()));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastdni, m) {
  m.def(
      "regression_loss_fwd(Tensor prediction, Tensor target, str reduction) -> "
      "(Tensor loss, Tensor error)");
  m.def("regression_loss_check(Tensor prediction, Tensor target, str reduction) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdni, CompositeExplicitAutograd, m) {
  m.impl("regression_loss_check", TORCH_BOX(&check_regression_loss));
}

}  // namespace fastdni
