#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>

#include "cuda/kernels/launch.h"
#include "cuda/kernels/sweep.cuh"
#include "cuda/kernels/sweep_phases.h"
#include "cuda/kernels/with_precision.h"

namespace fastdni::cuda {

std::vector<Task> sweep_tasks(const SweepProgram& program) {
  std::vector<Task> tasks;
  for (size_t j = 0; j < program.jobs.size(); ++j) {
    const Job& job = program.jobs[j];
    for (int32_t output = 0; output < job.outputs; output += kSweepRows) {
      int32_t input = 0;
      do {
        tasks.push_back({static_cast<int32_t>(j), output, input});
        input += kUpdateColumns;
      } while (input < job.inputs);
    }
  }
  std::stable_partition(tasks.begin(), tasks.end(), [&](const Task& task) {
    return task.input == 0 && program.jobs[task.job].bias >= 0;
  });
  return tasks;
}

int64_t sweep_bias_tasks(const SweepProgram& program) {
  int64_t count = 0;
  for (const Job& job : program.jobs) {
    if (job.bias >= 0) count += (job.outputs + kSweepRows - 1) / kSweepRows;
  }
  return count;
}

namespace {

// A grid takes 65535 in its second direction; no GPU has as many blocks at work.
constexpr int kMostColumns = 4096;

template <class T>
cudaError_t launch_instructions(const SweepStep<T>& step, int first, int last, LaunchPlan plan,
                                cudaStream_t stream) {
  return with_precision<T>(step.precision, [&](auto precision) {
    return launch(sweep_rows_kernel<precision(), T>, plan, stream, step, first, last,
                  plan.clusters);
  });
}

template <class T>
void make(const SweepStep<T>& step, const LibraryProduct& product, const Library& library) {
  if (product.stage < 0 || step.active.has(product.stage)) library(product);
}

template <class T>
cudaError_t launch_segments(const SweepStep<T>& step, const SweepProgram& program,
                            const std::vector<Segment>& segments, Spread spread,
                            const Library& library, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (const Segment& segment : segments) {
    for (int r = segment.reduce_first; r < segment.reduce_last && error == cudaSuccess; ++r) {
      const int64_t columns = program.reductions[r].columns;
      const int64_t blocks = (columns + kReductionColumns - 1) / kReductionColumns;
      error = launch(sweep_reduction_kernel<T>, {blocks, kSweepThreads}, stream, step, r,
                     program.row_blocks);
    }
    for (int p = segment.library_first; p < segment.library_last && error == cudaSuccess; ++p) {
      make(step, program.library[p], library);
    }
    LaunchPlan plan{program.row_blocks, kSweepThreads};
    if (spread != Spread::phases) {
      plan.clusters = spread == Spread::clusters;
      plan.columns = plan.clusters ? sweep_cluster(program) : 1;
      if (error == cudaSuccess && segment.first < segment.last) {
        error = launch_instructions(step, segment.first, segment.last, plan, stream);
      }
      continue;
    }
    for (int i = segment.first; i < segment.last && error == cudaSuccess;) {
      const int end = phase_end(program, segment, i);
      plan.columns = std::min(phase_tiles(program, i, end), kMostColumns);
      error = launch_instructions(step, i, end, plan, stream);
      i = end;
    }
  }
  return error;
}

}  // namespace

int sweep_cluster(const SweepProgram& program) {
  const auto most = static_cast<unsigned>(std::min<int>(program.widest, kSweepCluster));
  return static_cast<int>(std::bit_ceil(most));
}

template <class T>
bool sweep_clusters(Precision precision, int blocks) {
  bool taken = false;
  const LaunchPlan plan{1, kSweepThreads, blocks, true};
  with_precision<T>(precision, [&](auto kind) {
    const auto kernel = sweep_rows_kernel<kind(), T>;
    // Code for older GPUs runs on newer ones, too.
    taken = code_architecture(kernel) >= 90 && most_clusters(kernel, plan) > 0;
    return cudaSuccess;
  });
  return taken;
}

cudaError_t launch_sweep_write(void* to, const void* bytes, size_t count, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (size_t at = 0; at < count && error == cudaSuccess; at += SweepBytes::kMost) {
    const size_t some = std::min(count - at, SweepBytes::kMost);
    SweepBytes sent;
    std::memcpy(sent.words, static_cast<const std::byte*>(bytes) + at, some);
    auto* words = reinterpret_cast<uint32_t*>(static_cast<std::byte*>(to) + at);
    error = launch(sweep_write_kernel, {1, kSweepThreads}, stream, sent, words,
                   static_cast<int>((some + 3) / sizeof(uint32_t)));
  }
  return error;
}

template <class T>
cudaError_t launch_sweep_forward(const SweepStep<T>& step, const SweepProgram& program,
                                 Spread spread, const Library& library, cudaStream_t stream) {
  const auto reductions = static_cast<int64_t>(program.reductions.size());
  if (reductions > 0) {
    const int64_t blocks = (reductions + kWarpSize - 1) / kWarpSize;
    const cudaError_t error = launch(sweep_count_kernel<T>, {blocks, kWarpSize}, stream, step,
                                     static_cast<int>(reductions));
    if (error != cudaSuccess) return error;
  }
  if (program.label_counts >= 0) {
    const int64_t blocks = (step.batch + kCountedLabels - 1) / kCountedLabels;
    const cudaError_t error = launch(sweep_labels_kernel<T>, {blocks, kSweepThreads}, stream, step);
    if (error != cudaSuccess) return error;
  }
  return launch_segments(step, program, program.forward, spread, library, stream);
}

template <class T>
cudaError_t launch_sweep_regression(const SweepStep<T>& step, const SweepProgram& program,
                                    Spread spread, const Library& library, cudaStream_t stream) {
  return launch_segments(step, program, program.regression, spread, library, stream);
}

template <class T>
cudaError_t launch_sweep_loss(const SweepStep<T>& step, cudaStream_t stream) {
  return launch(sweep_loss_kernel<T>, {1, kSweepThreads}, stream, step);
}

template <class T>
cudaError_t launch_sweep_update(const SweepStep<T>& step, const SweepProgram& program,
                                const Library& library, cudaStream_t stream) {
  for (const LibraryProduct& gradient : program.gradients) make(step, gradient, library);
  if (step.prepares) {
    const int64_t blocks = (step.parameter_count + kWarpSize - 1) / kWarpSize;
    const cudaError_t error = launch(sweep_prepare_kernel<T>, {blocks, kWarpSize}, stream, step);
    if (error != cudaSuccess) return error;
  }
  if (program.summed_pieces > 0 && step.bias_task_count > 0) {
    const LaunchPlan plan{step.bias_task_count, kSweepThreads, program.summed_pieces};
    const cudaError_t error = launch(sweep_sums_kernel<T>, plan, stream, step);
    if (error != cudaSuccess) return error;
  }
  return with_precision<T>(step.precision, [&](auto precision) {
    return launch(sweep_update_kernel<precision(), T>, {step.task_count + 1, kSweepThreads}, stream,
                  step);
  });
}

#define INSTANTIATE(T)                                                                           \
  template bool sweep_clusters<T>(Precision, int);                                               \
  template cudaError_t launch_sweep_forward(const SweepStep<T>&, const SweepProgram&, Spread,    \
                                            const Library&, cudaStream_t);                       \
  template cudaError_t launch_sweep_regression(const SweepStep<T>&, const SweepProgram&, Spread, \
                                               const Library&, cudaStream_t);                    \
  template cudaError_t launch_sweep_loss(const SweepStep<T>&, cudaStream_t);                     \
  template cudaError_t launch_sweep_update(const SweepStep<T>&, const SweepProgram&,             \
                                           const Library&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace fastdni::cuda
