// The criterion: each row's loss and gradient, and the loss of all.
#pragma once
#include <cmath>

#include "cuda/kernels/block_reduce.cuh"
#include "cuda/kernels/sweep_rows.cuh"

namespace fastdni::cuda {

// Of the threads of a row, which are neighbours in a warp.
template <class T>
__device__ T row_maximum(T value) {
#pragma unroll
  for (int distance = kSweepLanes / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other > value || other != other ? other : value;  // NaN stays
  }
  return value;
}

// For all threads of the block.
template <class T>
__device__ T block_total(T own) {
  FASTDNI_SHARED(T, total, 1);
  own = block_sum<kSweepThreads>(own);
  if (threadIdx.x == 0) total[0] = own;
  __syncthreads();
  return total[0];
}

// How many of the labels [first, last) are not to be ignored.
template <class T>
__device__ T counted_labels(const SweepStep<T>& step, int64_t first, int64_t last) {
  const auto* labels = static_cast<const int64_t*>(step.target);
  T own = 0;
  for (int64_t r = first + threadIdx.x; r < last; r += kSweepThreads) {
    own += labels[r] != kIgnoreIndex;
  }
  return block_total(own);
}

// A block for every kCountedLabels labels, where there are more.
template <class T>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks<T>)
    sweep_labels_kernel(const SweepStep<T> step) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kCountedLabels;
  const int64_t end = first + kCountedLabels;
  const T counted = counted_labels(step, first, end < step.batch ? end : step.batch);
  if (threadIdx.x == 0) step.workspace[step.label_counts + blockIdx.x] = counted;
}

// The number of rows that the criterion counts.
template <class T>
__device__ T counted_rows(const SweepStep<T>& step) {
  if (step.label_counts < 0) return counted_labels(step, 0, step.batch);
  T own = 0;
  for (int64_t i = threadIdx.x; i * kCountedLabels < step.batch; i += kSweepThreads) {
    own += step.workspace[step.label_counts + i];
  }
  return block_total(own);
}

// A label that is none (which the host cannot see without waiting for the device) makes the row's
// loss and gradient NaN.
template <class T>
__device__ void run_criterion(const SweepStep<T>& step, const Instruction& op) {
  const RowThread thread = row_thread(step);
  const T* h = resolve(step, op.a) + thread.begin(op.columns);
  T* out = resolve(step, op.out) + thread.begin(op.columns);
  T loss = 0;
  if (step.criterion == Criterion::mse) {
    const T scale = T(2) / (static_cast<T>(step.batch) * op.columns);
    const T* target = static_cast<const T*>(step.target) + thread.begin(op.columns);
    for (int c = thread.lane; thread.inside && c < op.columns; c += kSweepLanes) {
      const T error = h[c] - target[c];
      loss += error * error;
      out[c] = scale * error;
    }
  } else {
    const T counted = counted_rows(step);
    const T scale = T(1) / (counted > 1 ? counted : T(1));
    T largest = -T(__builtin_inf());
    for (int c = thread.lane; thread.inside && c < op.columns; c += kSweepLanes) {
      largest = h[c] > largest || h[c] != h[c] ? h[c] : largest;
    }
    largest = row_maximum(largest);
    T sum = 0;
    for (int c = thread.lane; thread.inside && c < op.columns; c += kSweepLanes) {
      sum += exponential(h[c] - largest);
    }
    sum = warp_sum<kSweepLanes>(sum);
    if (thread.inside) {
      const int64_t label = static_cast<const int64_t*>(step.target)[thread.row];
      const bool ignored = label == kIgnoreIndex;
      const bool known = label >= 0 && label < op.columns;
      const T nan = T(__builtin_nan(""));
      for (int c = thread.lane; c < op.columns; c += kSweepLanes) {
        const T probability = exponential(h[c] - largest) / sum;
        const T gradient = (probability - T(c == label)) * scale;
        out[c] = ignored ? T(0) : known ? gradient : nan;
      }
      if (thread.lane == 0 && !ignored) {
        loss = known ? largest + log(sum) - h[label] : nan;
      }
    }
  }
  loss = block_sum<kSweepThreads>(loss);
  if (threadIdx.x == 0) step.workspace[op.partials + blockIdx.x] = loss;
  __syncthreads();  // before the next sum
}

template <class T>
__device__ void report_criterion(const SweepStep<T>& step) {
  double counted = static_cast<double>(step.batch) * step.outputs;
  if (step.criterion == Criterion::cross_entropy) counted = counted_rows(step);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < step.criterion_loss.count; i += kSweepThreads) {
    sum += step.workspace[step.criterion_loss.partials + i];
  }
  sum = block_sum<kSweepThreads>(sum);
  if (threadIdx.x == 0) *step.loss = static_cast<T>(sum / counted);
}

template <class T>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks<T>)
    sweep_loss_kernel(const SweepStep<T> step) {
  report_criterion(step);
}

}  // namespace fastdni::cuda
