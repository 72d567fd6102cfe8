// update_ on the CPU.
#include "cpu/update.h"

#include "ops/synthesizer.h"
#include "ops/update.h"

namespace fastdni::cpu {
namespace {

void update_op(const std::string& caller, const Tensors& parameters, const Tensors& gradients,
               const Tensors& state, const Integers& groups, const std::vector<double>& settings) {
  const Tensors found = check_gradients(caller, parameters, gradients);
  check_kernel_dtype(caller, parameters[0]);
  std::vector<ParameterMemory> memory;
  OptimizerBinding optimizer =
      bind_parameters(caller, placement_of(parameters[0], "parameters are"), parameters, state,
                      groups, settings, memory);
  update_parameters(optimizer, memory, found);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdni, CPU, m) { m.impl("update_", TORCH_BOX(&update_op)); }

}  // namespace fastdni::cpu
