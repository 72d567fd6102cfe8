// regression_loss on a GPU: one launch, or two where there are many elements.
#include "cuda/kernels/regression_loss.h"

#include "cuda/device.h"
#include "ops/reduction.h"
#include "ops/regression_loss.h"

namespace fastdni::cuda {
namespace {

std::tuple<Tensor, Tensor> regression_loss_fwd(const Tensor& prediction, const Tensor& target,
                                               const std::string& reduction) {
  check_regression_loss_kernel(prediction, target, reduction);
  const OnDevice device(prediction);
  Tensor loss = empty_accumulate(prediction, {});
  Tensor error = empty_accumulate(prediction, shape_of(prediction));
  const Tensor p = as_contiguous(prediction), t = as_contiguous(target);
  const int64_t n = prediction.numel();
  Tensor partials = empty_accumulate(prediction, {regression_loss_plan(n).blocks});

  with_dtype(prediction.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    const RegressionLoss<T> args{data<T>(p),
                                 data<T>(t),
                                 mutable_data<A>(error),
                                 mutable_data<A>(loss),
                                 mutable_data<A>(partials),
                                 n,
                                 reduction_divisor(kRegressionLoss, reduction, prediction)};
    check(kRegressionLoss, launch_regression_loss(args, device.stream()));
  });
  return {loss, error};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdni, FASTDNI_CUDA_KEY, m) {
  m.impl("regression_loss_fwd", TORCH_BOX(&regression_loss_fwd));
}

}  // namespace fastdni::cuda
