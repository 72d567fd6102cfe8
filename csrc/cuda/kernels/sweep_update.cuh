// The weights' and biases' gradients with their optimizers, and the losses.
#pragma once
#include <cmath>

#include "cuda/kernels/sweep_criterion.cuh"

namespace fastdni::cuda {

inline __device__ double read(const DeviceNumber& number) {
  return number.wide ? *static_cast<const double*>(number.at)
                     : *static_cast<const float*>(number.at);
}

// An update of which some numbers are on the GPU. Raises the step count where that is one.
template <class T>
__device__ Update<T> prepare(const SweepParameter<T>& p) {
  double count = p.count;
  if (p.step.at != nullptr) {
    count = read(p.step) + 1;
    if (p.step.wide) {
      *static_cast<double*>(p.step.at) = count;
    } else {
      *static_cast<float*>(p.step.at) = static_cast<float>(count);
    }
  }
  OptimizerSettings settings = p.settings;
  if (p.lr.at != nullptr) settings.lr = read(p.lr);
  return prepared<T>(settings, count, [](double beta, double n) { return pow(beta, n); });
}

// One thread for each parameter.
template <class T>
__global__ void sweep_prepare_kernel(const SweepStep<T> step) {
  const int i = blockIdx.x * kWarpSize + threadIdx.x;
  if (i >= step.parameter_count) return;
  SweepParameter<T>& p = step.parameters[i];
  if (p.step.at != nullptr || p.lr.at != nullptr) p.update = prepare(p);
}

template <class T>
__device__ void update_at(const SweepParameter<T>& p, T grad, int64_t at) {
  T* value = p.value + at;
  T* first = p.first == nullptr ? nullptr : p.first + at;
  T* second = p.second == nullptr ? nullptr : p.second + at;
  switch (p.update.rule) {
    case Rule::gradient:
      return update_element<Rule::gradient>(p.update, grad, value, first, second);
    case Rule::sgd:
      return update_element<Rule::sgd>(p.update, grad, value, first, second);
    case Rule::sgd_momentum:
      return update_element<Rule::sgd_momentum>(p.update, grad, value, first, second);
    case Rule::adam:
      return update_element<Rule::adam>(p.update, grad, value, first, second);
    case Rule::adamw:
      return update_element<Rule::adamw>(p.update, grad, value, first, second);
    default:
      return;
  }
}

template <class T>
__device__ bool is_updated(const SweepStep<T>& step, int parameter) {
  return parameter >= 0 && step.parameters[parameter].update.rule != Rule::none;
}

// A tile of grad^T input, whole over the batch.
template <Precision precision, class T>
__device__ void multiply_gradient(const SweepStep<T>& step, const Job& job, const Task& task,
                                  T (&sums)[kTileResults]) {
  Side<T> input{resolve(step, job.input), job.inputs, false, job.inputs};
  if (input.data == nullptr) input.labels = static_cast<const int64_t*>(step.target);
  multiply_deep<precision, T>({resolve(step, job.grad), job.outputs, false, job.outputs},
                              task.output, input, task.input, step.batch, sums);
}

// A tile of a weight's gradient, and its update.
template <Precision precision, class T>
__device__ void update_weight(const SweepStep<T>& step, const Job& job, const Task& task) {
  const bool is_ready = job.ready.place != Place::none;
  T sums[kTileResults];
  if (!is_ready) multiply_gradient<precision>(step, job, task, sums);
  const T* ready = resolve(step, job.ready);
  const SweepParameter<T> parameter = step.parameters[job.weight];
  const int64_t output = task.output + threadIdx.x / kSweepLanes;
#pragma unroll
  for (int j = 0; j < kTileResults; ++j) {
    const int64_t column = task.input + threadIdx.x % kSweepLanes + j * kSweepLanes;
    if (output >= job.outputs || column >= job.inputs) continue;
    const int64_t at = output * job.inputs + column;
    update_at(parameter, is_ready ? ready[at] : sums[j], at);
  }
}

// The sum of a column of grad (rows, columns) for each of the first kSweepRows threads: of column
// first + threadIdx.x, where there is one.
template <class T>
__device__ T column_sum(const T* grad, int64_t rows, int columns, int first) {
  constexpr int kWarps = kSweepThreads / kWarpSize, kGroups = kSweepThreads / kSweepRows;
  // Joined in double: more additions in a row would lose more than torch's own sums do.
  constexpr int64_t kStep = 16 * kGroups;
  constexpr int kSums = kWarps * kSweepRows;
  FASTDNI_SHARED(double, sums, kSums);
  static_assert(kGroups == 2 * kWarps);
  const int column = threadIdx.x % kSweepRows, group = threadIdx.x / kSweepRows;
  double sum = 0;
  for (int64_t begin = group; begin < rows && first + column < columns; begin += kStep) {
    const int64_t end = begin + kStep < rows ? begin + kStep : rows;
    T part = 0;
#pragma unroll 8  // several reads on their way
    for (int64_t r = begin; r < end; r += kGroups) part += grad[r * columns + first + column];
    sum += part;
  }
  sum += __shfl_xor_sync(kAllLanes, sum, kSweepRows);
  if (group % 2 == 0) sums[group / 2 * kSweepRows + column] = sum;
  __syncthreads();
  for (int w = 1; w < kWarps && group == 0; ++w) sum += sums[w * kSweepRows + column];
  return static_cast<T>(sum);
}

// Block (x, y): of the columns of a task that has biases, the sums of the y-th kSummedRows rows.
template <class T>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks<T>)
    sweep_sums_kernel(const SweepStep<T> step) {
  const Task& task = step.tasks[blockIdx.x];
  const Job& job = step.jobs[task.job];
  if (!step.active.has(job.stage)) return;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kSummedRows, left = step.batch - first;
  const T* grad = resolve(step, job.grad) + first * job.outputs;
  const T sum =
      column_sum<T>(grad, left < kSummedRows ? left : kSummedRows, job.outputs, task.output);
  const int output = task.output + threadIdx.x;
  if (threadIdx.x >= kSweepRows || output >= job.outputs) return;
  resolve(step, job.sums)[static_cast<int64_t>(blockIdx.y) * job.outputs + output] = sum;
}

template <class T>
__device__ void update_biases(const SweepStep<T>& step, const Job& job, const Task& task) {
  const bool divided = job.sums.place != Place::none;
  const int64_t rows = divided ? (step.batch + kSummedRows - 1) / kSummedRows : step.batch;
  const T* of_rows = resolve(step, divided ? job.sums : job.grad);
  const T sum = column_sum<T>(of_rows, rows, job.outputs, task.output);
  const int output = task.output + threadIdx.x;
  if (threadIdx.x >= kSweepRows || output >= job.outputs) return;
  if (is_updated(step, job.bias)) update_at(step.parameters[job.bias], sum, output);
  if (is_updated(step, job.second_bias)) update_at(step.parameters[job.second_bias], sum, output);
}

// The losses: the criterion's, then a warp to each synthesizer's.
template <class T>
__device__ void report(const SweepStep<T>& step) {
  if (step.loss != nullptr) report_criterion(step);
  const int lane = threadIdx.x % kWarpSize;
  for (int l = threadIdx.x / kWarpSize; l < step.loss_count; l += kSweepThreads / kWarpSize) {
    const Loss& loss = step.losses[l];
    double sum = 0;
    for (int64_t i = lane; i < loss.count; i += kWarpSize) sum += step.workspace[loss.partials + i];
    sum = warp_sum(sum);
    if (lane != 0) continue;
    const bool masked = !step.active.has(loss.stage);
    step.synthesis_loss[l] = masked ? T(__builtin_nan("")) : static_cast<T>(sum / step.divisor);
  }
}

template <Precision precision, class T>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks<T>)
    sweep_update_kernel(const SweepStep<T> step) {
  if (static_cast<int32_t>(blockIdx.x) == step.task_count) {
    report(step);
    return;
  }
  const Task& task = step.tasks[blockIdx.x];
  const Job& job = step.jobs[task.job];
  if (!step.active.has(job.stage)) return;
  if (is_updated(step, job.weight)) update_weight<precision>(step, job, task);
  const bool biases = is_updated(step, job.bias) || is_updated(step, job.second_bias);
  if (biases && task.input == 0) update_biases(step, job, task);
}

}  // namespace fastdni::cuda
