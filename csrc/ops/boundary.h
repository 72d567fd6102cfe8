// The argument rules of the op boundary_, for every device, and what it is given, sorted.
#pragma once
#include <string>

#include "ops/optimizer_binding.h"
#include "ops/tensor.h"

namespace fastdni {

// A boundary's synthesizer with its optimizer.
struct BoundaryArguments {
  Tensors weights, biases;
  OptionalTensor context_weight, context_bias;
  std::vector<ParameterMemory> memory;  // of weights, biases, context_weight, context_bias
  OptimizerBinding optimizer;
};

BoundaryArguments check_boundary(const std::string& caller, const Tensor& trigger,
                                 const OptionalTensor& context, const Tensor& target,
                                 const Tensors& parameters, int64_t layers, bool bias,
                                 const Tensors& state, const Integers& groups,
                                 const std::vector<double>& settings,
                                 const OptionalTensor& prediction, const Tensors& hidden);

}  // namespace fastdni
