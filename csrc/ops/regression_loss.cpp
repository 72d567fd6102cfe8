// regression_loss: error = prediction - target; loss = sum(error^2) / divisor.
#include "cpu/regression_loss.h"

#include <numeric>

#include "ops/reduction.h"
#include "ops/tensor.h"
#if defined(FASTDNI_CUDA)
#include "cuda/regression_loss.h"
#include "ops/cuda.h"
#endif

namespace fastdni {
namespace {

constexpr const char* kOp = "regression_loss";

void check_regression_loss(const Tensor& prediction, const Tensor& target,
                           const std::string& reduction) {
  FASTDNI_CHECK(prediction.device() == target.device(), kOp,
                ": target must be on prediction's device");
  FASTDNI_CHECK(shape_of(prediction) == shape_of(target), kOp,
                ": target must have prediction's shape ", to_string(shape_of(prediction)), ", got ",
                to_string(shape_of(target)));
  FASTDNI_CHECK(prediction.scalar_type() == target.scalar_type(), kOp,
                ": target must have prediction's dtype ", to_string(prediction.scalar_type()),
                ", got ", to_string(target.scalar_type()));
  reduction_divisor(kOp, reduction, prediction);
}

void check_kernel_dtype(const Tensor& prediction) {
  FASTDNI_CHECK(has_kernel(prediction.scalar_type()), kOp,
                ": prediction must be float32, float64 or bfloat16, got ",
                to_string(prediction.scalar_type()));
}

std::tuple<Tensor, Tensor> regression_loss_cpu(const Tensor& prediction, const Tensor& target,
                                               const std::string& reduction) {
  check_regression_loss(prediction, target, reduction);
  check_kernel_dtype(prediction);
  Tensor loss = empty_accumulate(prediction, {});
  Tensor error = empty_accumulate(prediction, shape_of(prediction));
  const Tensor p = as_contiguous(prediction), t = as_contiguous(target);
  const int64_t n = prediction.numel();
  std::vector<double> partials((n + cpu::kRegressionLossChunk - 1) / cpu::kRegressionLossChunk);

  with_dtype(prediction.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    const cpu::RegressionLoss<T> args{data<T>(p), data<T>(t), mutable_data<A>(error),
                                      partials.data(), n};
    cpu::with_isa([&](auto isa) {
      constexpr int64_t kChunksPerTask = 4;  // 16,384 elements: worth waking a thread for
      torch::stable::parallel_for(0, partials.size(), kChunksPerTask,
                                  [&](int64_t first, int64_t last) {
                                    cpu::regression_loss_chunks<isa.value, T>(args, first, last);
                                  });
    });
    const double sum = std::accumulate(partials.begin(), partials.end(), 0.0);
    *mutable_data<A>(loss) = static_cast<A>(sum / reduction_divisor(kOp, reduction, prediction));
  });
  return {loss, error};
}

#if defined(FASTDNI_CUDA)
std::tuple<Tensor, Tensor> regression_loss_cuda(const Tensor& prediction, const Tensor& target,
                                                const std::string& reduction) {
  check_regression_loss(prediction, target, reduction);
  check_kernel_dtype(prediction);
  const cuda::OnDevice device(prediction);
  Tensor loss = empty_accumulate(prediction, {});
  Tensor error = empty_accumulate(prediction, shape_of(prediction));
  const Tensor p = as_contiguous(prediction), t = as_contiguous(target);
  const int64_t n = prediction.numel();
  Tensor partials = empty_accumulate(prediction, {cuda::regression_loss_plan(n).blocks});

  with_dtype(prediction.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    const cuda::RegressionLoss<T> args{data<T>(p),
                                       data<T>(t),
                                       mutable_data<A>(error),
                                       mutable_data<A>(loss),
                                       mutable_data<A>(partials),
                                       n,
                                       reduction_divisor(kOp, reduction, prediction)};
    cuda::check(kOp, cuda::launch_regression_loss(args, device.stream()));
  });
  return {loss, error};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdni, m) {
  m.def(
      "regression_loss_fwd(Tensor prediction, Tensor target, str reduction) -> "
      "(Tensor loss, Tensor error)");
  m.def("regression_loss_check(Tensor prediction, Tensor target, str reduction) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdni, CompositeExplicitAutograd, m) {
  m.impl("regression_loss_check", TORCH_BOX(&check_regression_loss));
}

STABLE_TORCH_LIBRARY_IMPL(fastdni, CPU, m) {
#if defined(FASTDNI_CUDA_ON_HOST)
  m.impl("regression_loss_fwd", TORCH_BOX(&regression_loss_cuda));
#else
  m.impl("regression_loss_fwd", TORCH_BOX(&regression_loss_cpu));
#endif
}

#if defined(FASTDNI_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastdni, CUDA, m) {
  m.impl("regression_loss_fwd", TORCH_BOX(&regression_loss_cuda));
}
#endif

}  // namespace fastdni
