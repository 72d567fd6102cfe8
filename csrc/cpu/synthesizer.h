// The passes of a synthesizer on the CPU, for the ops that need one; arguments are checked.
#pragma once
#include <tuple>

#include "ops/tensor.h"

namespace fastdni::cpu {

// The prediction and the activations of the hidden layers.
std::tuple<Tensor, Tensors> evaluate_synthesizer(const Tensor& trigger,
                                                 const OptionalTensor& context,
                                                 const Tensors& weights, const Tensors& biases,
                                                 const OptionalTensor& context_weight,
                                                 const OptionalTensor& context_bias);

// The loss, sum(e^2) / divisor, and every parameter's gradient. Where there is an `error` it becomes
// e = prediction - target.
std::tuple<Tensor, Tensors> regress_synthesizer(const Tensor& target, const Tensor& prediction,
                                                const Tensors& hidden, const Tensor& trigger,
                                                const OptionalTensor& context,
                                                const Tensors& weights, bool bias, double divisor,
                                                const OptionalTensor& error);

}  // namespace fastdni::cpu
