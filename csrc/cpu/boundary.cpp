// boundary_ on the CPU: the passes of the synthesizer ops, and the sweep's updates of the gradients
// that they leave (rounded to bfloat16 where the parameters are).
#include "ops/boundary.h"

#include "common/names.h"
#include "cpu/synthesizer.h"
#include "cpu/update.h"
#include "ops/synthesizer.h"

namespace fastdni::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> boundary(const std::string& caller, const Tensor& trigger,
                                            const OptionalTensor& context, const Tensor& target,
                                            const Tensors& parameters, int64_t layers, bool bias,
                                            const Tensors& state, const Integers& groups,
                                            const std::vector<double>& settings, double scale,
                                            const OptionalTensor& prediction, const Tensors& hidden,
                                            const std::string& precision) {
  BoundaryArguments given = check_boundary(caller, trigger, context, target, parameters, layers,
                                           bias, state, groups, settings, prediction, hidden);
  precision_named(caller, precision);  // exact whatever it is
  check_kernel_dtype(caller, trigger);
  std::tuple<Tensor, Tensors> made;
  if (prediction.has_value()) {
    made = {*prediction, hidden};
  } else {
    made = evaluate_synthesizer(trigger, context, given.weights, given.biases, given.context_weight,
                                given.context_bias);
  }
  const auto& [message, activations] = made;
  const Tensor error = empty_accumulate(trigger, shape_of(message));
  const auto [loss, gradients] = regress_synthesizer(target, message, activations, trigger, context,
                                                     given.weights, bias, 2 / scale, error);
  update_parameters(given.optimizer, given.memory, gradients);
  return {loss, prediction.has_value() ? empty(trigger, {0}) : message, error};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdni, CPU, m) { m.impl("boundary_", TORCH_BOX(&boundary)); }

}  // namespace fastdni::cpu
