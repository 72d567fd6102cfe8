// regression_loss on the CPU: chunks spread over threads, their sums joined in order.
#include "ops/regression_loss.h"

#include <numeric>

#include "cpu/kernels/regression_loss.h"
#include "ops/reduction.h"

namespace fastdni::cpu {
namespace {

std::tuple<Tensor, Tensor> regression_loss_fwd(const Tensor& prediction, const Tensor& target,
                                               const std::string& reduction) {
  check_regression_loss_kernel(prediction, target, reduction);
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
    *mutable_data<A>(loss) =
        static_cast<A>(sum / reduction_divisor(kRegressionLoss, reduction, prediction));
  });
  return {loss, error};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdni, CPU, m) {
  m.impl("regression_loss_fwd", TORCH_BOX(&regression_loss_fwd));
}

}  // namespace fastdni::cpu
