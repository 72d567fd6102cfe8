// Kernels of the sweep. Every sum has an order that follows from the shapes: no atomics.
#pragma once
#include <cmath>

#include "cuda/block_reduce.cuh"
#include "cuda/sweep.h"
#include "cuda/tile_product.cuh"

namespace fastdni::cuda {

constexpr int kSweepLanes = kTileLanes;  // threads of a row
// Columns of a BatchNorm that a block joins the moments of.
constexpr int kReductionColumns = 16;
constexpr int64_t kIgnoredLabel = -100;
static_assert(kSweepThreads == kTileThreads && kSweepRows == kTileRows);
static_assert(kSweepColumns == kTileColumns && kUpdateColumns == kTileColumns);
// Blocks on a multiprocessor at least: 128 registers a thread, 255 for float64, which is for
// proofs.
template <class T>
constexpr int kSweepBlocks = sizeof(T) == sizeof(float) ? 2 : 1;

inline __global__ void sweep_write_kernel(const SweepBytes bytes, uint32_t* to, int words) {
  for (int i = threadIdx.x; i < words; i += kSweepThreads) to[i] = bytes.words[i];
}

template <class T>
__device__ T activated(Activation activation, T u) {
  switch (activation) {
    case Activation::relu:
      return activate<Activation::relu>(u);
    case Activation::tanh:
      return activate<Activation::tanh>(u);
    case Activation::sigmoid:
      return activate<Activation::sigmoid>(u);
    default:
      return u;
  }
}

template <class T>
__device__ T differentiated(Activation activation, T grad, T h) {
  switch (activation) {
    case Activation::relu:
      return activation_gradient<Activation::relu>(grad, h);
    case Activation::tanh:
      return activation_gradient<Activation::tanh>(grad, h);
    case Activation::sigmoid:
      return activation_gradient<Activation::sigmoid>(grad, h);
    default:
      return grad;
  }
}

// What a thread of a block of rows works on: row `row` of the batch, in every tile of columns the
// columns lane, lane + kSweepLanes, ...
struct RowThread {
  int row;
  int lane;
  bool inside;  // a row of the batch

  __device__ int64_t begin(int columns) const { return static_cast<int64_t>(row) * columns; }
};

template <class T>
__device__ RowThread row_thread(const SweepStep<T>& step) {
  const int row = blockIdx.x * kSweepRows + threadIdx.x / kSweepLanes;
  return {row, static_cast<int>(threadIdx.x % kSweepLanes), row < step.batch};
}

// The context's part where it is one-hot labels: a column of the weight.
template <Products products, class T>
__device__ void add_label(const SweepStep<T>& step, const RowThread& thread, const Instruction& op,
                          int first, T (&sums)[kTileResults]) {
  if (!thread.inside) return;
  const T* weight = resolve(step, op.context_weight);
  const int64_t label = static_cast<const int64_t*>(step.target)[thread.row];
  if (label < 0 || label >= op.context) return;
#pragma unroll
  for (int j = 0; j < kTileResults; ++j) {
    const int64_t column = first + thread.lane + j * kSweepLanes;
    if (column < op.columns) {
      sums[j] += TileProduct<products, T>::operand(weight[column * op.context + label]);
    }
  }
}

// Columns [first, ...) of an instruction's product, this thread's.
template <Products products, class T>
__device__ void multiply(const SweepStep<T>& step, const RowThread& thread, const Instruction& op,
                         int first, T (&sums)[kTileResults]) {
  const int first_row = blockIdx.x * kSweepRows, rows = static_cast<int>(step.batch);
  const bool given = op.context > 0 && step.context != nullptr;
  const bool weighted = op.weight.place != Place::none;
  if (weighted || given) {
    TileProduct<products, T> tile;
#pragma unroll 1  // one piece of code for both parts
    for (int part = weighted ? 0 : 1; part <= given; ++part) {
      const bool of_context = part == 1;
      const int depth = of_context ? op.context : op.depth;
      const T* weight = resolve(step, of_context ? op.context_weight : op.weight);
      const bool transposed = !of_context && op.transposed;
      tile.add({of_context ? step.context : resolve(step, op.a), depth, true, rows}, first_row,
               {weight, transposed ? op.columns : depth, !transposed, op.columns}, first, depth);
    }
    tile.finish(sums);
  }
  if (op.context > 0 && !given) add_label<products>(step, thread, op, first, sums);
}

template <Products products, class T>
__device__ void run_product(const SweepStep<T>& step, const Instruction& op) {
  const RowThread thread = row_thread(step);
  const bool computed = op.weight.place != Place::none;
  const int tiles = (op.columns + kSweepColumns - 1) / kSweepColumns;
  for (int tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int first = tile * kSweepColumns;
    T sums[kTileResults] = {};
    multiply<products>(step, thread, op, first, sums);
    const T* a = computed ? nullptr : resolve(step, op.a);  // null, too, where there is no depth
    const T* bias = resolve(step, op.bias);
    const T* second_bias = resolve(step, op.second_bias);
    const T* other = resolve(step, op.other);
    T* out = resolve(step, op.out);
    T squares = 0;
#pragma unroll
    for (int j = 0; j < kTileResults; ++j) {
      const int column = first + thread.lane + j * kSweepLanes;
      if (!thread.inside || column >= op.columns) continue;
      const int64_t at = thread.begin(op.columns) + column;
      T c = a == nullptr ? sums[j] : a[at] + sums[j];
      switch (op.finish) {
        case Finish::activate:
          if (bias != nullptr) c += bias[column];
          if (second_bias != nullptr) c += second_bias[column];
          out[at] = activated(op.activation, c);
          break;
        case Finish::differentiate:
          out[at] = differentiated(op.activation, c, other[at]);
          break;
        case Finish::regress: {
          const T error = other[at] - c;
          squares += error * error;
          out[at] = static_cast<T>(2 / step.divisor) * error;
          break;
        }
      }
    }
    if (op.finish == Finish::regress) {
      squares = block_sum<kSweepThreads>(squares);
      if (threadIdx.x == 0) step.workspace[op.partials + blockIdx.x * tiles + tile] = squares;
      __syncthreads();  // before the next sum
    }
  }
}

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

// The number of rows that the criterion counts.
template <class T>
__device__ T counted_rows(const SweepStep<T>& step) {
  FASTDNI_SHARED(T, count, 1);
  T own = 0;
  const auto* labels = static_cast<const int64_t*>(step.target);
  for (int64_t r = threadIdx.x; r < step.batch; r += kSweepThreads) {
    own += labels[r] != kIgnoredLabel;
  }
  own = block_sum<kSweepThreads>(own);
  if (threadIdx.x == 0) count[0] = own;
  __syncthreads();
  return count[0];
}

// A label that is none (which the host cannot see without waiting for the device) makes the row's
// loss and gradient NaN.
template <class T>
__device__ void run_criterion(const SweepStep<T>& step, const Instruction& op) {
  if (blockIdx.y != 0) return;
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
      const bool ignored = label == kIgnoredLabel;
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

// Rows of this block, the same for all of its threads.
template <class T>
__device__ int64_t last_row(const SweepStep<T>& step) {
  const int64_t end = static_cast<int64_t>(blockIdx.x + 1) * kSweepRows;
  return end < step.batch ? end : step.batch;
}

template <class T>
__device__ void run_moments(const SweepStep<T>& step, const Instruction& op) {
  const T* a = resolve(step, op.a);
  const T* other = resolve(step, op.other);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSweepRows, end = last_row(step);
  T* first = step.workspace + op.partials + static_cast<int64_t>(blockIdx.x) * op.columns;
  T* second = first + static_cast<int64_t>(gridDim.x) * op.columns;
  for (int c = blockIdx.y * kSweepThreads + threadIdx.x; c < op.columns;
       c += gridDim.y * kSweepThreads) {
    T sum = 0, products = 0;
    if (op.op == Op::moments) {
      for (int64_t r = begin; r < end; ++r) sum += a[r * op.columns + c];
      sum /= static_cast<T>(end - begin);
      for (int64_t r = begin; r < end; ++r) {
        const T off = a[r * op.columns + c] - sum;
        products += off * off;
      }
    } else {
      for (int64_t r = begin; r < end; ++r) {
        sum += a[r * op.columns + c];
        products += a[r * op.columns + c] * other[r * op.columns + c];
      }
    }
    first[c] = sum;
    second[c] = products;
  }
}

template <class T>
__device__ void run_normalize(const SweepStep<T>& step, const Instruction& op) {
  const RowThread thread = row_thread(step);
  const T* mean = step.workspace + op.statistics;
  const T* inverse = mean + op.columns;
  const T* sums = inverse + op.columns;
  const T* products = sums + op.columns;
  const T* gamma = resolve(step, op.weight);
  const T* beta = resolve(step, op.bias);
  T* out = resolve(step, op.out);
  T* other = resolve(step, op.other);
  const T batch = static_cast<T>(step.batch);
  for (int c = blockIdx.y * kSweepLanes + thread.lane; thread.inside && c < op.columns;
       c += gridDim.y * kSweepLanes) {
    const int64_t at = thread.begin(op.columns) + c;
    if (op.op == Op::normalize) {
      const T z = (out[at] - mean[c]) * inverse[c];
      out[at] = z;
      other[at] = activated(op.activation, gamma == nullptr ? z : z * gamma[c] + beta[c]);
    } else {
      const T scale = gamma == nullptr ? inverse[c] : inverse[c] * gamma[c];
      out[at] = scale * (out[at] - sums[c] / batch - other[at] * (products[c] / batch));
    }
  }
}

// Instructions [first, last) of the program, on the rows of this block; in a cluster, on those of
// all of its blocks.
template <Products products, class T>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks<T>)
    sweep_rows_kernel(const SweepStep<T> step, int first, int last, bool cluster) {
  for (int i = first; i < last; ++i) {
    const Instruction& op = step.instructions[i];
    if (op.stage >= 0 && !step.active.has(op.stage)) continue;
    switch (op.op) {
      case Op::product:
        run_product<products>(step, op);
        break;
      case Op::criterion:
        run_criterion(step, op);
        break;
      case Op::moments:
      case Op::gradient_moments:
        run_moments(step, op);
        break;
      default:
        run_normalize(step, op);
    }
    // What has been written is there for all who work on these rows.
    if (cluster) {
      cluster_barrier();
    } else {
      __syncthreads();
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
    double sum = 0, products = 0;
    for (int64_t b = begin; b < row_blocks; b += kSlices) {
      sum += first[b * op.columns];
      products += second[b * op.columns];
    }
    sum = column_total(sum);
    products = column_total(products);
    if (!reports) return;
    mean_out[2 * op.columns] = static_cast<T>(sum);
    mean_out[3 * op.columns] = static_cast<T>(products);
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

// ---- updates ----

inline __device__ double read(const DeviceNumber& number) {
  return number.wide ? *static_cast<const double*>(number.at)
                     : *static_cast<const float*>(number.at);
}

// The updates whose numbers are on the GPU: one thread for each parameter.
template <class T>
__global__ void sweep_prepare_kernel(const SweepStep<T> step) {
  const int i = blockIdx.x * kWarpSize + threadIdx.x;
  if (i >= step.parameter_count) return;
  SweepParameter<T>& p = step.parameters[i];
  if (p.step.at == nullptr && p.lr.at == nullptr) return;
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
  p.update = prepared<T>(settings, count, [](double beta, double n) { return pow(beta, n); });
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
template <Products products, class T>
__device__ void multiply_gradient(const SweepStep<T>& step, const Job& job, const Task& task,
                                  T (&sums)[kTileResults]) {
  Side<T> input{resolve(step, job.input), job.inputs, false, job.inputs};
  if (input.data == nullptr) input.labels = static_cast<const int64_t*>(step.target);
  TileProduct<products, T> tile;
  tile.add({resolve(step, job.grad), job.outputs, false, job.outputs}, task.output, input,
           task.input, static_cast<int>(step.batch));
  tile.finish(sums);
}

// A tile of a weight's gradient, and its update.
template <Products products, class T>
__device__ void update_weight(const SweepStep<T>& step, const Job& job, const Task& task) {
  const bool is_ready = job.ready.place != Place::none;
  T sums[kTileResults];
  if (!is_ready) multiply_gradient<products>(step, job, task, sums);
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
  FASTDNI_SHARED(T, sums, kWarps * kSweepRows);
  static_assert(kGroups == 2 * kWarps);
  const int column = threadIdx.x % kSweepRows, group = threadIdx.x / kSweepRows;
  T sum = 0;
  if (first + column < columns) {
    for (int64_t r = group; r < rows; r += kGroups) sum += grad[r * columns + first + column];
  }
  sum += __shfl_xor_sync(kAllLanes, sum, kSweepRows);
  if (group % 2 == 0) sums[group / 2 * kSweepRows + column] = sum;
  __syncthreads();
  if (group > 0) return sum;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * kSweepRows + column];
  return sum;
}

template <class T>
__device__ void update_biases(const SweepStep<T>& step, const Job& job, const Task& task) {
  const T sum = column_sum<T>(resolve(step, job.grad), step.batch, job.outputs, task.output);
  const int output = task.output + threadIdx.x;
  if (threadIdx.x >= kSweepRows || output >= job.outputs) return;
  if (is_updated(step, job.bias)) update_at(step.parameters[job.bias], sum, output);
  if (is_updated(step, job.second_bias)) update_at(step.parameters[job.second_bias], sum, output);
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

template <Products products, class T>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks<T>)
    sweep_update_kernel(const SweepStep<T> step) {
  if (static_cast<int32_t>(blockIdx.x) == step.task_count) {
    report(step);
    return;
  }
  const Task& task = step.tasks[blockIdx.x];
  const Job& job = step.jobs[task.job];
  if (!step.active.has(job.stage)) return;
  if (is_updated(step, job.weight)) update_weight<products>(step, job, task);
  const bool biases = is_updated(step, job.bias) || is_updated(step, job.second_bias);
  if (biases && task.input == 0) update_biases(step, job, task);
}

template <class T>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks<T>)
    sweep_loss_kernel(const SweepStep<T> step) {
  report_criterion(step);
}

}  // namespace fastdni::cuda
