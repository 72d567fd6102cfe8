// update_ on the CPU.
#include "cpu/update.h"

#include "ops/synthesizer.h"
#include "ops/update.h"

namespace fastdni::cpu {
namespace {

void update_all(const std::string& caller, const Tensors& parameters, const Tensors& gradients,
                const Tensors& state, const Integers& groups, const std::vector<double>& settings) {
  const Tensors found = check_gradients(caller, parameters, gradients);
  check_kernel_dtype(caller, parameters[0]);
  std::vector<ParameterMemory> memory;
  OptimizerBinding optimizer =
      bind_parameters(caller, placement_of(parameters[0], "parameters are"), parameters, state,
                      groups, settings, memory);
  optimizer.raise_steps();
  with_dtype(parameters[0].scalar_type(), [&](auto scalar) {
    for (size_t i = 0; i < parameters.size(); ++i) {
      update_parameter<decltype(scalar)>(memory[i], found[i]);
    }
  });
  optimizer.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdni, CPU, m) { m.impl("update_", TORCH_BOX(&update_all)); }

}  // namespace fastdni::cpu
