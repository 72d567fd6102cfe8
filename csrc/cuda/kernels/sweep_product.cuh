// A product of the sweep, and what is done with its results while they are at hand.
#pragma once
#include "cuda/kernels/block_reduce.cuh"
#include "cuda/kernels/sweep_rows.cuh"

namespace fastdni::cuda {

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

// The context's part where it is one-hot labels: a column of the weight.
template <Precision precision, class T>
__device__ void add_label(const SweepStep<T>& step, const Instruction& op, int first,
                          T (&sums)[kTileResults]) {
  const RowThread thread = row_thread(step);
  if (!thread.inside) return;
  const T* weight = resolve(step, op.context_weight);
  const int64_t label = static_cast<const int64_t*>(step.target)[thread.row];
  if (label < 0 || label >= op.context) return;
#pragma unroll
  for (int j = 0; j < kTileResults; ++j) {
    const int64_t column = first + thread.lane + j * kSweepLanes;
    if (column < op.columns) {
      sums[j] += TileProduct<precision, T>::operand(weight[column * op.context + label]);
    }
  }
}

// Columns [first, ...) of an instruction's product, this thread's.
template <Precision precision, class T>
__device__ void multiply(const SweepStep<T>& step, const Instruction& op, int first,
                         T (&sums)[kTileResults]) {
  const int first_row = blockIdx.x * kSweepRows, rows = static_cast<int>(step.batch);
  const bool given = op.context > 0 && step.context != nullptr;
  const bool weighted = op.weight.place != Place::none;
  if (weighted || given) {
    TileProduct<precision, T> tile;
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
  if (op.context > 0 && !given) add_label<precision>(step, op, first, sums);
}

template <Precision precision, class T>
__device__ void run_product(const SweepStep<T>& step, const Instruction& op, int tile) {
  const int first = tile * kSweepColumns;
  T sums[kTileResults] = {};
  multiply<precision>(step, op, first, sums);
  const RowThread thread = row_thread(step);
  const bool computed = op.weight.place != Place::none;
  const T* a = computed ? nullptr : resolve(step, op.a);  // null, too, where there is no depth
  const T* bias = resolve(step, op.bias);
  const T* second_bias = resolve(step, op.second_bias);
  const T* other = resolve(step, op.other);
  T* out = resolve(step, op.out);
  T* dz = resolve(step, op.dz);
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
      case Finish::synthesize:
        if (bias != nullptr) c += bias[column];
        if (second_bias != nullptr) c += second_bias[column];
        out[at] = c;
        dz[at] = differentiated(op.activation, c, other[at]);
        break;
      case Finish::differentiate:
        out[at] = differentiated(op.activation, c, other[at]);
        break;
      case Finish::regress: {
        const T error = other[at] - c;
        squares += error * error;
        out[at] = step.scale * error;
        if (dz != nullptr) dz[at] = error;
        break;
      }
    }
  }
  if (op.finish == Finish::regress) {
    squares = block_sum<kSweepThreads>(squares);
    if (threadIdx.x == 0) step.workspace[op.partials + blockIdx.x * op.tiles() + tile] = squares;
    __syncthreads();  // before the next sum
  }
}

}  // namespace fastdni::cuda
