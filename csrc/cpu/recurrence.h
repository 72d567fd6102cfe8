// The passes of the recurrence on the CPU, for the ops that need one.
#pragma once
#include <tuple>

#include "ops/tensor.h"

namespace fastdni::cpu {

// Output, the state after the window, and what the backward pass needs.
std::tuple<Tensor, Tensors, Tensor> recurrence_fwd(const std::string& cell, const Tensor& x,
                                                   const Tensors& state, const Tensors& weights,
                                                   bool bias);

// The gradients of x (empty where it is not wanted), of the state before the window, and of the
// weights. Without grad_state nothing comes to the state after it.
std::tuple<Tensor, Tensors, Tensors> recurrence_bwd(
    const std::string& cell, const Tensor& x, const Tensors& state, const Tensors& weights,
    bool bias, const Tensor& output, const Tensor& saved, const OptionalTensor& grad_output,
    const Tensors& grad_state, bool input_gradient);

}  // namespace fastdni::cpu
