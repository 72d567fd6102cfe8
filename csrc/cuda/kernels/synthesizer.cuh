// Kernels of a synthesizer's passes; what they do is the sweep's.
#pragma once
#include "cuda/kernels/sweep.cuh"
#include "cuda/kernels/synthesizer.h"

namespace fastdni::cuda {

template <Precision precision, class T>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks<T>)
    synthesizer_layer_kernel(const SweepStep<T> step, const Instruction op) {
  run_product<precision>(step, op, blockIdx.y);
}

template <class T>
__global__ void synthesizer_prepare_kernel(const SweepParameter<T> parameter, Update<T>* prepared) {
  *prepared = prepare(parameter);
}

template <class T>
__device__ bool is_updated(const SynthesizerParameter<T>& p) {
  return p.parameter.update.rule != Rule::none;
}

template <class T>
__device__ SweepParameter<T> with_numbers(const SynthesizerParameter<T>& p) {
  SweepParameter<T> parameter = p.parameter;
  if (p.prepared != nullptr) parameter.update = *p.prepared;
  return parameter;
}

// Block (x, y): a tile of the weight's gradient; those of y = 0 also its biases, and one more in x
// the loss.
template <Precision precision, class T>
__global__ void __launch_bounds__(kSweepThreads, kSweepBlocks<T>)
    synthesizer_gradient_kernel(const SynthesizerGradient<T> args) {
  const int first_output = blockIdx.x * kSweepRows, first_input = blockIdx.y * kSweepColumns;
  if (blockIdx.x + 1 == gridDim.x) {
    if (args.loss == nullptr || blockIdx.y > 0) return;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < args.partial_count; i += kSweepThreads) {
      sum += args.partials[i];
    }
    sum = block_sum<kSweepThreads>(sum);
    if (threadIdx.x == 0) *args.loss = static_cast<T>(sum / args.divisor);
    return;
  }
  if (is_updated(args.weight)) {
    T sums[kTileResults];
    if (args.ready == nullptr) {
      multiply_deep<precision, T>({args.grad, args.outputs, false, args.outputs}, first_output,
                                  {args.input, args.inputs, false, args.inputs}, first_input,
                                  args.rows, sums);
    }
    const SweepParameter<T> weight = with_numbers(args.weight);
    const int64_t output = first_output + threadIdx.x / kSweepLanes;
#pragma unroll
    for (int j = 0; j < kTileResults; ++j) {
      const int column = first_input + threadIdx.x % kSweepLanes + j * kSweepLanes;
      if (output < args.outputs && column < args.inputs) {
        const int64_t at = output * args.inputs + column;
        update_at(weight, args.ready == nullptr ? sums[j] : args.ready[at], at);
      }
    }
  }
  const bool biases = is_updated(args.bias) || is_updated(args.second_bias);
  if (!biases || blockIdx.y > 0) return;
  const T sum = column_sum(args.grad, args.rows, args.outputs, first_output);
  const int output = first_output + threadIdx.x;
  if (threadIdx.x >= kSweepRows || output >= args.outputs) return;
  if (is_updated(args.bias)) update_at(with_numbers(args.bias), sum, output);
  if (is_updated(args.second_bias)) update_at(with_numbers(args.second_bias), sum, output);
}

}  // namespace fastdni::cuda
