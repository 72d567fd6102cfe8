// boundary_: a synthesizer M at a boundary; its prediction, its regression on what arrived and its
// update, in one call. The equations are in fastdni/reference/boundary.py.
//
//   g^ = M(h, ctx);   e = g^ - target;   loss = scale / 2 sum(e^2);   every parameter's update by
//   the loss's gradient, with the parameters as they were
//
// Parameters are M's weights, biases and the context's weight and bias; `layers` and `bias` say
// which is which. Where the prediction is given (with the hidden layers' activations), the forward
// pass is skipped, and an empty tensor returned in its place.
#include "ops/boundary.h"

#include "ops/synthesizer.h"
#include "ops/update.h"

namespace fastdni {

BoundaryArguments check_boundary(const std::string& caller, const Tensor& trigger,
                                 const OptionalTensor& context, const Tensor& target,
                                 const Tensors& parameters, int64_t layers, bool bias,
                                 const Tensors& state, const Integers& groups,
                                 const std::vector<double>& settings,
                                 const OptionalTensor& prediction, const Tensors& hidden) {
  FASTDNI_CHECK(layers >= 1, caller, ": layers must be 1 or more, got ", layers);
  const int64_t of_layer = bias ? 2 : 1;
  const int64_t count = of_layer * (layers + context.has_value());
  FASTDNI_CHECK(static_cast<int64_t>(parameters.size()) == count, caller, ": parameters must hold ",
                count, " tensors for ", layers, " layers",
                context.has_value() ? " and a context" : "", ", got ", parameters.size());
  BoundaryArguments given;
  const auto weights_end = parameters.begin() + layers;
  const auto biases_end = weights_end + (bias ? layers : 0);
  given.weights.assign(parameters.begin(), weights_end);
  given.biases.assign(weights_end, biases_end);
  if (context.has_value()) {
    given.context_weight = *biases_end;
    if (bias) given.context_bias = *(biases_end + 1);
  }
  check_synthesizer(caller, trigger, context, given.weights, given.biases, given.context_weight,
                    given.context_bias);
  check_regression_target(caller, target, trigger, given.weights);
  if (prediction.has_value()) {
    check_activations(caller, *prediction, hidden, trigger, given.weights);
  } else {
    FASTDNI_CHECK(hidden.empty(), caller, ": hidden must be empty without a prediction, got ",
                  hidden.size());
  }

  given.optimizer = bind_parameters(caller, placement_of(trigger, "trigger is"), parameters, state,
                                    groups, settings, given.memory);
  return given;
}

namespace {

void check(const std::string& caller, const Tensor& trigger, const OptionalTensor& context,
           const Tensor& target, const Tensors& parameters, int64_t layers, bool bias,
           const Tensors& state, const Integers& groups, const std::vector<double>& settings,
           double /* scale */, const OptionalTensor& prediction, const Tensors& hidden) {
  check_boundary(caller, trigger, context, target, parameters, layers, bias, state, groups,
                 settings, prediction, hidden);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdni, m) {
  m.def(
      "boundary_(str caller, Tensor trigger, Tensor? context, Tensor target, "
      "Tensor(a!)[] parameters, int layers, bool bias, Tensor(b!)[] state, int[] groups, "
      "float[] settings, float scale, Tensor? prediction, Tensor[] hidden, "
      "str precision=\"exact\") -> (Tensor loss, Tensor prediction, Tensor error)");
  m.def(
      "boundary_check(str caller, Tensor trigger, Tensor? context, Tensor target, "
      "Tensor[] parameters, int layers, bool bias, Tensor[] state, int[] groups, "
      "float[] settings, float scale, Tensor? prediction, Tensor[] hidden) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdni, CompositeExplicitAutograd, m) {
  m.impl("boundary_check", TORCH_BOX(&check));
}

}  // namespace fastdni
