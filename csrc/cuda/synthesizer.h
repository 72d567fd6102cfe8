// The passes of a synthesizer on a GPU, for the ops that need one; arguments are checked.
#pragma once
#include <string>
#include <tuple>
#include <vector>

#include "cuda/kernels/synthesizer.h"
#include "ops/tensor.h"

namespace fastdni::cuda {

// The kernels are for float32 and float64 in memory.
void check_cuda_dtype(const std::string& caller, const Tensor& tensor);

template <class Body>
void with_cuda_dtype(const Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == ScalarType::Double) return body(double{});
  body(float{});
}

// The prediction and the activations of the hidden layers.
std::tuple<Tensor, Tensors> evaluate_synthesizer(const Tensor& trigger,
                                                 const OptionalTensor& context,
                                                 const Tensors& weights, const Tensors& biases,
                                                 const OptionalTensor& context_weight,
                                                 const OptionalTensor& context_bias,
                                                 Precision precision, cudaStream_t stream);

// The loss, sum(e^2) / divisor, and every parameter's update by its gradient. Where there is a
// `difference` it becomes e = prediction - target. `parameters`: those of weights, biases, the
// context's weight and bias, as far as there are any.
template <class T>
Tensor regress_synthesizer(const Tensor& target, const Tensor& prediction, const Tensors& hidden,
                           const Tensor& trigger, const OptionalTensor& context,
                           const Tensors& weights, bool bias, double divisor,
                           const OptionalTensor& difference,
                           const std::vector<SynthesizerParameter<T>>& parameters,
                           Precision precision, cudaStream_t stream);

}  // namespace fastdni::cuda
