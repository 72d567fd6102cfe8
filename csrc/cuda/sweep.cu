#include "cuda/launch.h"
#include "cuda/sweep.cuh"

namespace fastdni::cuda {

std::vector<Task> sweep_tasks(const SweepProgram& program) {
  std::vector<Task> tasks;
  for (size_t j = 0; j < program.jobs.size(); ++j) {
    const Job& job = program.jobs[j];
    for (int32_t output = 0; output < job.outputs; output += kUpdateTile) {
      int32_t input = 0;
      do {
        tasks.push_back({static_cast<int32_t>(j), output, input});
        input += kUpdateTile;
      } while (input < job.inputs);
    }
  }
  return tasks;
}

namespace {

template <class T>
cudaError_t launch_segments(const SweepStep<T>& step, const SweepProgram& program,
                            const std::vector<Segment>& segments, bool split, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (const Segment& segment : segments) {
    for (int r = segment.reduce_first; r < segment.reduce_last && error == cudaSuccess; ++r) {
      const int64_t columns = program.reductions[r].columns;
      const int64_t blocks = (columns + kSweepThreads - 1) / kSweepThreads;
      error = launch(sweep_reduction_kernel<T>, {blocks, kSweepThreads}, stream, step, r,
                     program.row_blocks);
    }
    for (int i = segment.first; i < segment.last && error == cudaSuccess;) {
      const int last = split ? i + 1 : segment.last;
      const int64_t columns = program.instructions[i].columns;
      const int64_t tiles = split ? (columns + kSweepColumns - 1) / kSweepColumns : 1;
      error = launch(sweep_rows_kernel<T>, {program.row_blocks, kSweepThreads, tiles}, stream, step,
                     i, last);
      i = last;
    }
  }
  return error;
}

}  // namespace

template <class T>
cudaError_t launch_sweep_forward(const SweepStep<T>& step, const SweepProgram& program, bool split,
                                 cudaStream_t stream) {
  const auto reductions = static_cast<int64_t>(program.reductions.size());
  if (reductions > 0) {
    const int64_t blocks = (reductions + kWarpSize - 1) / kWarpSize;
    const cudaError_t error = launch(sweep_count_kernel<T>, {blocks, kWarpSize}, stream, step,
                                     static_cast<int>(reductions));
    if (error != cudaSuccess) return error;
  }
  return launch_segments(step, program, program.forward, split, stream);
}

template <class T>
cudaError_t launch_sweep_regression(const SweepStep<T>& step, const SweepProgram& program,
                                    bool split, cudaStream_t stream) {
  return launch_segments(step, program, program.regression, split, stream);
}

template <class T>
cudaError_t launch_sweep_loss(const SweepStep<T>& step, cudaStream_t stream) {
  return launch(sweep_loss_kernel<T>, {1, kSweepThreads}, stream, step);
}

template <class T>
cudaError_t launch_sweep_update(const SweepStep<T>& step, cudaStream_t stream) {
  return launch(sweep_update_kernel<T>, {step.task_count + 1, kSweepThreads}, stream, step);
}

#define INSTANTIATE(T)                                                                         \
  template cudaError_t launch_sweep_forward(const SweepStep<T>&, const SweepProgram&, bool,    \
                                            cudaStream_t);                                     \
  template cudaError_t launch_sweep_regression(const SweepStep<T>&, const SweepProgram&, bool, \
                                               cudaStream_t);                                  \
  template cudaError_t launch_sweep_loss(const SweepStep<T>&, cudaStream_t);                   \
  template cudaError_t launch_sweep_update(const SweepStep<T>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace fastdni::cuda
