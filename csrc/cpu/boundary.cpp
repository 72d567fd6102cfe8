// boundary_ on the CPU: the passes of the synthesizer ops, and the sweep's updates of the gradients
// that they leave (rounded to bfloat16 where the parameters are).
#include "ops/boundary.h"

#include <cmath>

#include "common/names.h"
#include "cpu/kernels/sweep.h"
#include "cpu/synthesizer.h"
#include "ops/synthesizer.h"

namespace fastdni::cpu {
namespace {

template <class T>
void update_parameter(const ParameterMemory& memory, const Tensor& gradient) {
  const auto rule = prepared<accumulate_t<T>>(memory.settings, memory.step,
                                              [](double beta, double n) { return std::pow(beta, n); });
  if (rule.rule == Rule::none) return;
  constexpr int64_t kElementsPerTask = 16384;  // worth waking a thread for
  const T* grad = data<T>(gradient);
  // Any memory stands for what the rule does not look at.
  void* any = memory.value == nullptr ? memory.first : memory.value;
  const auto at = [any](void* begin, int64_t i) {
    return static_cast<T*>(begin == nullptr ? any : begin) + i;
  };
  with_isa([&](auto isa) {
    torch::stable::parallel_for(
        0, gradient.numel(), kElementsPerTask, [&](int64_t first, int64_t last) {
          update<isa.value, T>(rule, grad + first, at(memory.value, first), at(memory.first, first),
                               at(memory.second, first), last - first);
        });
  });
}

std::tuple<Tensor, Tensor, Tensor> boundary(
    const std::string& caller, const Tensor& trigger, const OptionalTensor& context,
    const Tensor& target, const Tensors& parameters, int64_t layers, bool bias,
    const Tensors& state, const Integers& groups, const std::vector<double>& settings, double scale,
    const OptionalTensor& prediction, const Tensors& hidden, const std::string& precision) {
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
  const auto [loss, gradients] = regress_synthesizer(
      target, message, activations, trigger, context, given.weights, bias, 2 / scale, error);
  given.optimizer.raise_steps();
  with_dtype(trigger.scalar_type(), [&](auto scalar) {
    for (size_t i = 0; i < parameters.size(); ++i) {
      update_parameter<decltype(scalar)>(given.memory[i], gradients[i]);
    }
  });
  given.optimizer.write_back();
  return {loss, prediction.has_value() ? empty(trigger, {0}) : message, error};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdni, CPU, m) { m.impl("boundary_", TORCH_BOX(&boundary)); }

}  // namespace fastdni::cpu
