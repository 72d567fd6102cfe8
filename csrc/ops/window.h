// The window ops: what stands around the recurrence in a decoupled window.
#pragma once
#include <string>

#include "common/network.h"
#include "ops/optimizer_binding.h"
#include "ops/tensor.h"

namespace fastdni {

// A state before its synthesizer: the first `predicted` of its tensors, (L, B, F) or (B, F), side
// by side in rows of `columns` numbers, layer after layer.
struct JoinedState {
  int64_t rows = 0, columns = 0;
};
JoinedState check_joined(const std::string& caller, const char* name, const Tensors& state,
                         int64_t predicted);

// M, as the boundary op has it.
struct WindowSynthesizer {
  Tensors weights, biases;
  OptionalTensor context_weight, context_bias;
};
// `trigger` is the joined state.
WindowSynthesizer check_window_synthesizer(const std::string& caller, const JoinedState& joined,
                                           const Tensor& trigger, const OptionalTensor& context,
                                           const Tensors& parameters, int64_t layers, bool bias);

struct HeadArguments {
  Criterion criterion;
  int64_t rows, inputs, outputs;
};
HeadArguments check_head(const std::string& caller, const Tensor& output,
                         const OptionalTensor& target, const std::string& criterion,
                         const Tensor& weight, const OptionalTensor& bias);

void check_rows(const std::string& caller, const char* name, const OptionalTensor& given,
                const JoinedState& joined);

}  // namespace fastdni
