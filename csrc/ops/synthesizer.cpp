// The synthesizer M(h, ctx), a perceptron that predicts a gradient (or an activation), and its
// regression on what really arrived.
//
//   forward    a_0 = h W_0^T + b_0 + ctx Q^T + q;   a_i = relu(a_{i-1}) W_i^T + b_i;   g^ = a_n
//   backward   e = g^ - target;  loss = sum(e^2) / divisor;  every parameter's gradient of the loss
//
// No gradient goes to h or to ctx: M is never differentiated with respect to them.
#include "ops/synthesizer.h"

#include "ops/reduction.h"

namespace fastdni {
namespace {

void check_like(const std::string& caller, const char* name, const Tensor& tensor,
                const Tensor& trigger) {
  FASTDNI_CHECK(tensor.device() == trigger.device(), caller, ": ", name,
                " must be on trigger's device");
  FASTDNI_CHECK(tensor.scalar_type() == trigger.scalar_type(), caller, ": ", name,
                " must have trigger's dtype ", to_string(trigger.scalar_type()), ", got ",
                to_string(tensor.scalar_type()));
}

void check_shape(const std::string& caller, const char* name, const Tensor& tensor,
                 const Shape& expected) {
  FASTDNI_CHECK(shape_of(tensor) == expected, caller, ": ", name, " must be ", to_string(expected),
                ", got ", to_string(shape_of(tensor)));
}

void check_weights(const std::string& caller, const Tensor& trigger, const Tensors& weights) {
  FASTDNI_CHECK(!weights.empty(), caller, ": weights must hold at least one matrix, got none");
  FASTDNI_CHECK(trigger.dim() >= 1, caller, ": trigger must be (..., K), got a 0-d tensor");
  int64_t width = trigger.size(-1);
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string name = "weights[" + std::to_string(i) + "]";
    check_like(caller, name.c_str(), weights[i], trigger);
    FASTDNI_CHECK(weights[i].dim() == 2, caller, ": ", name, " must be (N, K), got ",
                  to_string(shape_of(weights[i])));
    if (i == 0) {
      FASTDNI_CHECK(weights[0].size(1) == width, caller, ": trigger must be (..., ",
                    weights[0].size(1), ") to meet the first weight ",
                    to_string(shape_of(weights[0])), ", got ", to_string(shape_of(trigger)));
    } else {
      check_shape(caller, name.c_str(), weights[i], {weights[i].size(0), width});
    }
    width = weights[i].size(0);
  }
}

}  // namespace

void check_synthesizer(const std::string& caller, const Tensor& trigger,
                       const OptionalTensor& context, const Tensors& weights, const Tensors& biases,
                       const OptionalTensor& context_weight, const OptionalTensor& context_bias) {
  check_weights(caller, trigger, weights);
  FASTDNI_CHECK(biases.empty() || biases.size() == weights.size(), caller,
                ": biases must be empty or one per weight (", weights.size(), "), got ",
                biases.size());
  for (size_t i = 0; i < biases.size(); ++i) {
    const std::string name = "biases[" + std::to_string(i) + "]";
    check_like(caller, name.c_str(), biases[i], trigger);
    check_shape(caller, name.c_str(), biases[i], {weights[i].size(0)});
  }
  FASTDNI_CHECK(context.has_value() == context_weight.has_value(), caller,
                ": context and context_weight must be given together");
  FASTDNI_CHECK(!context_bias.has_value() || context_weight.has_value(), caller,
                ": context_bias needs a context_weight");
  if (!context.has_value()) return;
  check_like(caller, "context", *context, trigger);
  check_like(caller, "context_weight", *context_weight, trigger);
  FASTDNI_CHECK(context_weight->dim() == 2 && context_weight->size(0) == weights[0].size(0), caller,
                ": context_weight must be (", weights[0].size(0), ", C), got ",
                to_string(shape_of(*context_weight)));
  check_shape(caller, "context", *context, with_last(shape_of(trigger), context_weight->size(1)));
  if (context_bias.has_value()) {
    check_like(caller, "context_bias", *context_bias, trigger);
    check_shape(caller, "context_bias", *context_bias, {weights[0].size(0)});
  }
}

void check_activations(const std::string& caller, const Tensor& prediction, const Tensors& hidden,
                       const Tensor& trigger, const Tensors& weights) {
  check_like(caller, "prediction", prediction, trigger);
  check_shape(caller, "prediction", prediction,
              with_last(shape_of(trigger), weights.back().size(0)));
  FASTDNI_CHECK(hidden.size() + 1 == weights.size(), caller, ": hidden must hold ",
                weights.size() - 1, " activations, got ", hidden.size());
  for (size_t i = 0; i < hidden.size(); ++i) {
    const std::string name = "hidden[" + std::to_string(i) + "]";
    check_like(caller, name.c_str(), hidden[i], trigger);
    check_shape(caller, name.c_str(), hidden[i], {rows_of(trigger), weights[i].size(0)});
  }
}

void check_regression_target(const std::string& caller, const Tensor& target, const Tensor& trigger,
                             const Tensors& weights) {
  const bool wide =
      trigger.scalar_type() == ScalarType::BFloat16 && target.scalar_type() == ScalarType::Float;
  if (!wide || target.device() != trigger.device()) check_like(caller, "target", target, trigger);
  check_shape(caller, "target", target, with_last(shape_of(trigger), weights.back().size(0)));
}

double check_synthesizer_bwd(const Tensor& target, const Tensor& prediction, const Tensors& hidden,
                             const Tensor& trigger, const OptionalTensor& context,
                             const Tensors& weights, const std::string& reduction,
                             std::optional<double> scale) {
  const std::string caller = kSynthesizer;
  check_weights(caller, trigger, weights);
  check_activations(caller, prediction, hidden, trigger, weights);
  check_regression_target(caller, target, trigger, weights);
  if (context.has_value()) {
    check_like(caller, "context", *context, trigger);
    check_shape(caller, "context", *context,
                with_last(shape_of(trigger), context->dim() == 0 ? 0 : context->size(-1)));
  }
  const double divisor = reduction_divisor(kSynthesizer, reduction, prediction);
  return scale.has_value() ? 2 / *scale : divisor;
}

namespace {

void check_fwd(const Tensor& trigger, const OptionalTensor& context, const Tensors& weights,
               const Tensors& biases, const OptionalTensor& context_weight,
               const OptionalTensor& context_bias) {
  check_synthesizer(kSynthesizer, trigger, context, weights, biases, context_weight, context_bias);
}

void check_bwd(const Tensor& target, const Tensor& prediction, const Tensors& hidden,
               const Tensor& trigger, const OptionalTensor& context, const Tensors& weights,
               bool /* bias */, const std::string& reduction) {
  check_synthesizer_bwd(target, prediction, hidden, trigger, context, weights, reduction, {});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdni, m) {
  m.def(
      "synthesizer_fwd(Tensor trigger, Tensor? context, Tensor[] weights, Tensor[] biases, "
      "Tensor? context_weight, Tensor? context_bias, str precision=\"exact\") -> "
      "(Tensor prediction, Tensor[] hidden)");
  m.def(
      "synthesizer_bwd(Tensor target, Tensor prediction, Tensor[] hidden, Tensor trigger, "
      "Tensor? context, Tensor[] weights, bool bias, str reduction, str precision=\"exact\", "
      "float? scale=None) -> (Tensor loss, Tensor[] grads)");
  m.def(
      "synthesizer_check(Tensor trigger, Tensor? context, Tensor[] weights, Tensor[] biases, "
      "Tensor? context_weight, Tensor? context_bias) -> ()");
  m.def(
      "synthesizer_bwd_check(Tensor target, Tensor prediction, Tensor[] hidden, Tensor trigger, "
      "Tensor? context, Tensor[] weights, bool bias, str reduction) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdni, CompositeExplicitAutograd, m) {
  m.impl("synthesizer_check", TORCH_BOX(&check_fwd));
  m.impl("synthesizer_bwd_check", TORCH_BOX(&check_bwd));
}

}  // namespace fastdni
