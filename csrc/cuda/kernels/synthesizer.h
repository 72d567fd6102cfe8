// The passes of a synthesizer M(h, ctx) on its own, beside a network of any kind: the instructions
// and jobs of the sweep (csrc/cuda/kernels/sweep_program.h), one a launch, on matrices at given
// addresses.
#pragma once
#include "cuda/kernels/sweep.h"

namespace fastdni::cuda {

// A layer's weight gradient grad^T input and its bias gradients, the columns' sums of grad.
template <class T>
struct SynthesizerGradient {
  const T* grad;   // (rows, outputs)
  const T* input;  // (rows, inputs)
  int64_t rows;
  int32_t outputs, inputs;
  T* weight;       // (outputs, inputs), null where there is none to be made
  T* bias;         // (outputs,) or null
  T* second_bias;  // (outputs,) or null
  // Also the sum of `partial_count` partial sums over `divisor`, where `loss` is not null.
  T* loss;
  const T* partials;
  int64_t partial_count;
  double divisor;
};

// A product of `step.batch` rows, in blocks of kSweepRows rows and kSweepColumns columns.
template <class T>
cudaError_t launch_synthesizer_layer(const SweepStep<T>& step, const Instruction& op,
                                     cudaStream_t stream);

template <class T>
cudaError_t launch_synthesizer_gradient(const SynthesizerGradient<T>& args, Precision precision,
                                        cudaStream_t stream);

}  // namespace fastdni::cuda
