// update: parameters by their gradients, all in one call. The equations are those of
// fastdni/reference/optimizer.py.
#include "ops/update.h"

namespace fastdni {

OptimizerBinding bind_parameters(const std::string& caller, const Placement& placement,
                                 const Tensors& parameters, const Tensors& state,
                                 const Integers& groups, const std::vector<double>& settings,
                                 std::vector<ParameterMemory>& memory) {
  std::vector<Shape> shapes;
  for (const Tensor& parameter : parameters) shapes.push_back(shape_of(parameter));
  memory.resize(parameters.size());
  OptimizerBinding binding =
      bind_optimizer(caller, placement, Layout::any, shapes, state, groups, settings, memory);
  for (size_t i = 0; i < parameters.size(); ++i) {
    const Rule rule = memory[i].settings.rule;
    // Others do not touch the parameter itself.
    if (rule == Rule::none || rule == Rule::gradient) continue;
    FASTDNI_CHECK(parameters[i].scalar_type() == placement.dtype, caller,
                  ": parameters must be of one dtype, ", to_string(placement.dtype), ", got ",
                  to_string(parameters[i].scalar_type()));
    memory[i].value = binding.memory_of(parameters[i]);
  }
  return binding;
}

Tensors check_gradients(const std::string& caller, const Tensors& parameters,
                        const Tensors& gradients) {
  FASTDNI_CHECK(parameters.size() == gradients.size() && !parameters.empty(), caller,
                ": gradients must hold one for each of the ", parameters.size(),
                " parameters, got ", gradients.size());
  Tensors found;
  for (size_t i = 0; i < gradients.size(); ++i) {
    FASTDNI_CHECK(shape_of(gradients[i]) == shape_of(parameters[i]) &&
                      gradients[i].scalar_type() == parameters[i].scalar_type(),
                  caller, ": a gradient must have its parameter's shape ",
                  to_string(shape_of(parameters[i])), " and dtype, got ",
                  to_string(shape_of(gradients[i])));
    found.push_back(as_contiguous(gradients[i]));
  }
  return found;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastdni, m) {
  m.def(
      "update_(str caller, Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] state, "
      "int[] groups, float[] settings) -> ()");
}

}  // namespace fastdni
