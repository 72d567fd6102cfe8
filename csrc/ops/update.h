// Parameters with their gradients and optimizers, as any op is given them that updates both.
#pragma once
#include <string>
#include <vector>

#include "ops/optimizer_binding.h"
#include "ops/tensor.h"

namespace fastdni {

// Binds the optimizers, and the memory of parameters that are to change.
OptimizerBinding bind_parameters(const std::string& caller, const Placement& placement,
                                 const Tensors& parameters, const Tensors& state,
                                 const Integers& groups, const std::vector<double>& settings,
                                 std::vector<ParameterMemory>& memory);

// Gradients, one element after the other; each has its parameter's shape and dtype.
Tensors check_gradients(const std::string& caller, const Tensors& parameters,
                        const Tensors& gradients);

}  // namespace fastdni
