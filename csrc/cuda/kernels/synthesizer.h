// The passes of a synthesizer M(h, ctx) on its own, beside a network of any kind: the instructions
// and jobs of the sweep (csrc/cuda/kernels/sweep_program.h), one a launch, on matrices at given
// addresses.
#pragma once
#include "cuda/kernels/sweep.h"

namespace fastdni::cuda {

// A parameter to be updated. Its numbers may have been worked out on the GPU: then they are at
// `prepared`.
template <class T>
struct SynthesizerParameter {
  SweepParameter<T> parameter;
  const Update<T>* prepared;
};

// A layer's weight gradient grad^T input and its biases' gradients, the columns' sums of grad, each
// with its update. (Rule::gradient hands it out.)
template <class T>
struct SynthesizerGradient {
  const T* grad;   // (rows, outputs)
  const T* input;  // (rows, inputs)
  const T* ready;  // (outputs, inputs), the weight's gradient where that is known; or null
  int64_t rows;
  int32_t outputs, inputs;
  SynthesizerParameter<T> weight, bias, second_bias;  // (outputs, inputs), (outputs,), (outputs,)
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

// Works out an update whose step count (which it raises) or learning rate is on the GPU.
template <class T>
cudaError_t launch_synthesizer_prepare(const SweepParameter<T>& parameter, Update<T>* prepared,
                                       cudaStream_t stream);

}  // namespace fastdni::cuda
