// The recurrence op: a window of an LSTM, a GRU or a plain recurrent network, forward and backward.
#pragma once
#include <string>

#include "common/recurrence.h"
#include "ops/tensor.h"

namespace fastdni {

// What both directions are given, checked.
struct RecurrenceArguments {
  Cell cell;
  int64_t steps, batch, inputs, hidden, layers;
  bool bias;
  const Tensors& weights;

  int64_t gates() const { return gates_of(cell); }
  // Of layer l: W_ih, W_hh, and where there are biases b_ih, b_hh.
  const Tensor& weight(int64_t l, int64_t which) const {
    return weights[l * (bias ? 4 : 2) + which];
  }
  int64_t layer_inputs(int64_t l) const { return l == 0 ? inputs : hidden; }
};

RecurrenceArguments check_recurrence(const std::string& cell, const Tensor& x, const Tensors& state,
                                     const Tensors& weights, bool bias);

// The same of the backward pass, and what has come from above: output and state are such as the
// forward pass left them.
RecurrenceArguments check_recurrence_bwd(const std::string& cell, const Tensor& x,
                                         const Tensors& state, const Tensors& weights, bool bias,
                                         const Tensor& output, const OptionalTensor& grad_output,
                                         const Tensors& grad_state);

}  // namespace fastdni
