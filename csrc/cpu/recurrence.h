// The passes of the recurrence on the CPU, for the ops that need one.
#pragma once
#include <functional>
#include <tuple>

#include "ops/tensor.h"

namespace fastdni::cpu {

// What the forward pass leaves for the backward pass lies in memory of the caller's.
using SavedMemory = std::function<void*(int64_t bytes)>;
struct Saved {
  void* data;
  int64_t bytes;
};

// Output, and the state after the window.
std::tuple<Tensor, Tensors> recurrence_fwd(const std::string& cell, const Tensor& x,
                                           const Tensors& state, const Tensors& weights, bool bias,
                                           const SavedMemory& memory);

// The gradients of x (empty where it is not wanted), of the state before the window, and of the
// weights (none where they are not). Without grad_state nothing comes to the state after it.
std::tuple<Tensor, Tensors, Tensors> recurrence_bwd(
    const std::string& cell, const Tensor& x, const Tensors& state, const Tensors& weights,
    bool bias, const Tensor& output, const Saved& saved, const OptionalTensor& grad_output,
    const Tensors& grad_state, bool input_gradient, bool weight_gradients);

}  // namespace fastdni::cpu
