// What a sweep's ops are given, checked against their plan and bound to the memory of its next
// step. Everything that can be told from the arguments is checked before anything is written.
#pragma once
#include <string>
#include <vector>

#include "ops/sweep_plan.h"

namespace fastdni {

// Holds what was made contiguous until the step is over.
struct SweepInputs {
  Tensor x;
  OptionalTensor target, context, network_input;
};

void check_target(const std::string& caller, const Tensor& target, int64_t batch, int64_t outputs,
                  const std::string& criterion);

// Called for every parameter and state tensor of a step: no allocation unless it fails.
void check_values(const std::string& caller, const char* name, const Tensor& tensor,
                  const Shape& shape, ScalarType dtype, const Plan& plan);

SweepInputs check_inputs(const std::string& caller, const Plan& plan, const Tensor& x,
                         const OptionalTensor& target, const OptionalTensor& context);

void bind_inputs(Plan& plan, const SweepInputs& inputs);

void bind_parameters(const std::string& caller, Plan& plan, const Tensors& parameters,
                     const Integers& active);

void bind_statistics(const std::string& caller, Plan& plan, const Tensors& statistics);

OptimizerBinding bind_optimizer(const std::string& caller, Plan& plan, const Tensors& state,
                                const Integers& groups, const std::vector<double>& settings);

}  // namespace fastdni
