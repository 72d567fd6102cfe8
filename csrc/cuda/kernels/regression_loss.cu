#include "cuda/kernels/launch.h"
#include "cuda/kernels/regression_loss.cuh"

namespace fastdni::cuda {

template <class T>
cudaError_t launch_regression_loss(const RegressionLoss<T>& args, cudaStream_t stream) {
  const LaunchPlan plan = regression_loss_plan(args.n);
  cudaError_t error = launch(regression_loss_kernel<T>, plan, stream, args);
  if (error == cudaSuccess && plan.blocks > 1) {
    // The stream's order is the barrier between the partial sums and their total.
    error = launch(regression_loss_sum_kernel<T>, {1, plan.threads}, stream, args, plan.blocks);
  }
  return error;
}

template cudaError_t launch_regression_loss(const RegressionLoss<float>&, cudaStream_t);
template cudaError_t launch_regression_loss(const RegressionLoss<double>&, cudaStream_t);
template cudaError_t launch_regression_loss(const RegressionLoss<bfloat16>&, cudaStream_t);

}  // namespace fastdni::cuda
