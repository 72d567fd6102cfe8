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

// Binds what a forward part is given; what had to be made contiguous is in the result, which must
// live as long as the part is at work, as must the others.
SweepInputs bind_forward(const std::string& caller, Plan& plan, const Tensor& x,
                         const OptionalTensor& target, const OptionalTensor& context,
                         const OptionalTensor& network_input, const Tensors& noise,
                         const Tensors& parameters, const Tensors& statistics,
                         const Integers& active);

// Copies data that lies in memory which the step writes, once everything is bound.
void keep_apart(Plan& plan, SweepInputs& inputs);

// Whether the tensors of the last step are still such as it was given; if so, they are bound for it
// to be repeated once.
bool can_be_repeated(Plan& plan);

// Binds the data of a step, and nothing else: for one that `can_be_repeated`.
SweepInputs bind_data(const std::string& caller, Plan& plan, const Tensor& x,
                      const OptionalTensor& target, const OptionalTensor& context,
                      const Tensors& noise);

// Binds what optimizers are given: see ops/optimizer_binding.h.
OptimizerBinding bind_optimizer(const std::string& caller, Plan& plan, const Tensors& state,
                                const Integers& groups, const std::vector<double>& settings);

// Binds what the update of a forward part is given, the gradient from above into `arrived`.
OptimizerBinding bind_update(const std::string& caller, Plan& plan, const OptionalTensor& gradient,
                             const Tensors& parameters, const Tensors& state,
                             const Integers& groups, const std::vector<double>& settings,
                             const Integers& active, OptionalTensor& arrived);

}  // namespace fastdni
