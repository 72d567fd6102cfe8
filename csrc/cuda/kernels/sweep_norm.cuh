// BatchNorm: moments of a block's rows, what joins them, and the rows normalised by it.
#pragma once
#include <cmath>

#include "cuda/kernels/sweep_product.cuh"

namespace fastdni::cuda {

// Columns that a block joins the moments of.
constexpr int kReductionColumns = 16;

// Rows of this block, the same for all of its threads.
template <class T>
__device__ int64_t last_row(const SweepStep<T>& step) {
  const int64_t end = static_cast<int64_t>(blockIdx.x + 1) * kSweepRows;
  return end < step.batch ? end : step.batch;
}

template <class T>
__device__ void run_moments(const SweepStep<T>& step, const Instruction& op, int tile) {
  const int c = tile * kMomentColumns + threadIdx.x;
  if (c >= op.columns) return;
  const T* a = resolve(step, op.a);
  const T* other = resolve(step, op.other);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSweepRows, end = last_row(step);
  T* first = step.workspace + op.partials + static_cast<int64_t>(blockIdx.x) * op.columns;
  T* second = first + static_cast<int64_t>(gridDim.x) * op.columns;
  T sum = 0, dot = 0;
  if (op.op == Op::moments) {
    for (int64_t r = begin; r < end; ++r) sum += a[r * op.columns + c];
    sum /= static_cast<T>(end - begin);
    for (int64_t r = begin; r < end; ++r) {
      const T off = a[r * op.columns + c] - sum;
      dot += off * off;
    }
  } else {
    for (int64_t r = begin; r < end; ++r) {
      sum += a[r * op.columns + c];
      dot += a[r * op.columns + c] * other[r * op.columns + c];
    }
  }
  first[c] = sum;
  second[c] = dot;
}

template <class T>
__device__ void run_normalize(const SweepStep<T>& step, const Instruction& op, int tile) {
  const RowThread thread = row_thread(step);
  const T* mean = step.workspace + op.statistics;
  const T* inverse = mean + op.columns;
  const T* sums = inverse + op.columns;
  const T* dots = sums + op.columns;
  const T* gamma = resolve(step, op.weight);
  const T* beta = resolve(step, op.bias);
  T* out = resolve(step, op.out);
  T* other = resolve(step, op.other);
  const T batch = static_cast<T>(step.batch);
  const int past = (tile + 1) * kSweepColumns, end = past < op.columns ? past : op.columns;
  for (int c = tile * kSweepColumns + thread.lane; thread.inside && c < end; c += kSweepLanes) {
    const int64_t at = thread.begin(op.columns) + c;
    if (op.op == Op::normalize) {
      const T z = (out[at] - mean[c]) * inverse[c];
      out[at] = z;
      other[at] = activated(op.activation, gamma == nullptr ? z : z * gamma[c] + beta[c]);
    } else {
      const T scale = gamma == nullptr ? inverse[c] : inverse[c] * gamma[c];
      out[at] = scale * (out[at] - sums[c] / batch - other[at] * (dots[c] / batch));
    }
  }
}

// The sum of what the threads of a column found; for all threads of the block.
inline __device__ double column_total(double value) {
  FASTDNI_SHARED(double, values, kSweepThreads);
  __syncthreads();  // before the next sum
  values[threadIdx.x] = value;
  __syncthreads();
  double sum = 0;
  for (int t = threadIdx.x % kReductionColumns; t < kSweepThreads; t += kReductionColumns) {
    sum += values[t];
  }
  return sum;
}

// Joins the moments of the row blocks (Chan et al. 1979), which the threads of a column share.
template <class T>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks<T>)
    sweep_reduction_kernel(const SweepStep<T> step, int number, int64_t row_blocks) {
  const Reduction& op = step.reductions[number];
  if (op.of_gradient && !step.active.has(op.stage)) return;
  const int64_t c =
      static_cast<int64_t>(blockIdx.x) * kReductionColumns + threadIdx.x % kReductionColumns;
  const T* first = step.workspace + op.partials + c;
  const T* second = first + row_blocks * op.columns;
  T* mean_out = step.workspace + op.statistics + c;
  constexpr int kSlices = kSweepThreads / kReductionColumns;
  const bool inside = c < op.columns;
  const int64_t begin = inside ? threadIdx.x / kReductionColumns : row_blocks;
  const bool reports = inside && threadIdx.x < kReductionColumns;
  if (op.of_gradient) {
    double sum = 0, dot = 0;
    for (int64_t b = begin; b < row_blocks; b += kSlices) {
      sum += first[b * op.columns];
      dot += second[b * op.columns];
    }
    sum = column_total(sum);
    dot = column_total(dot);
    if (!reports) return;
    mean_out[2 * op.columns] = static_cast<T>(sum);
    mean_out[3 * op.columns] = static_cast<T>(dot);
    return;
  }
  const auto rows = [&](int64_t b) {
    const int64_t left = step.batch - b * kSweepRows;
    return static_cast<double>(left < kSweepRows ? left : kSweepRows);
  };
  double mean = 0, squares = 0;
  for (int64_t b = begin; b < row_blocks; b += kSlices) mean += first[b * op.columns] * rows(b);
  mean = column_total(mean) / step.batch;
  for (int64_t b = begin; b < row_blocks; b += kSlices) {
    const double off = first[b * op.columns] - mean;
    squares += second[b * op.columns] + off * off * rows(b);
  }
  squares = column_total(squares);
  if (!reports) return;
  mean_out[0] = static_cast<T>(mean);
  mean_out[op.columns] = static_cast<T>(1 / sqrt(squares / step.batch + op.eps));
  if (op.running < 0) return;
  T* running_mean = static_cast<T*>(step.statistics[op.running]) + c;
  T* running_variance = static_cast<T*>(step.statistics[op.running + 1]) + c;
  auto* tracked = static_cast<int64_t*>(step.statistics[op.running + 2]);
  // Raised by `sweep_count_kernel` before.
  const double momentum = op.momentum < 0 ? 1.0 / static_cast<double>(*tracked) : op.momentum;
  *running_mean = static_cast<T>((1 - momentum) * *running_mean + momentum * mean);
  *running_variance =
      static_cast<T>((1 - momentum) * *running_variance + momentum * (squares / (step.batch - 1)));
}

// Batches that the BatchNorms have seen: one thread for each reduction.
template <class T>
__global__ void sweep_count_kernel(const SweepStep<T> step, int reductions) {
  const int number = blockIdx.x * kWarpSize + threadIdx.x;
  if (number >= reductions) return;
  const Reduction& op = step.reductions[number];
  if (op.running >= 0) ++*static_cast<int64_t*>(step.statistics[op.running + 2]);
}

}  // namespace fastdni::cuda
