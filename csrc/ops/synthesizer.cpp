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

void check_like(const char* name, const Tensor& tensor, const Tensor& trigger) {
  FASTDNI_CHECK(tensor.device() == trigger.device(), kSynthesizer, ": ", name,
                " must be on trigger's device");
  FASTDNI_CHECK(tensor.scalar_type() == trigger.scalar_type(), kSynthesizer, ": ", name,
                " must have trigger's dtype ", to_string(trigger.scalar_type()), ", got ",
                to_string(tensor.scalar_type()));
}

void check_shape(const char* name, const Tensor& tensor, const Shape& expected) {
  FASTDNI_CHECK(shape_of(tensor) == expected, kSynthesizer, ": ", name, " must be ",
                to_string(expected), ", got ", to_string(shape_of(tensor)));
}

void check_weights(const Tensor& trigger, const Tensors& weights) {
  FASTDNI_CHECK(!weights.empty(), kSynthesizer,
                ": weights must hold at least one matrix, got none");
  FASTDNI_CHECK(trigger.dim() >= 1, kSynthesizer, ": trigger must be (..., K), got a 0-d tensor");
  int64_t width = trigger.size(-1);
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string name = "weights[" + std::to_string(i) + "]";
    check_like(name.c_str(), weights[i], trigger);
    FASTDNI_CHECK(weights[i].dim() == 2, kSynthesizer, ": ", name, " must be (N, K), got ",
                  to_string(shape_of(weights[i])));
    if (i == 0) {
      FASTDNI_CHECK(weights[0].size(1) == width, kSynthesizer, ": trigger must be (..., ",
                    weights[0].size(1), ") to meet the first weight ",
                    to_string(shape_of(weights[0])), ", got ", to_string(shape_of(trigger)));
    } else {
      check_shape(name.c_str(), weights[i], {weights[i].size(0), width});
    }
    width = weights[i].size(0);
  }
}

}  // namespace

void check_synthesizer(const Tensor& trigger, const OptionalTensor& context, const Tensors& weights,
                       const Tensors& biases, const OptionalTensor& context_weight,
                       const OptionalTensor& context_bias) {
  check_weights(trigger, weights);
  FASTDNI_CHECK(biases.empty() || biases.size() == weights.size(), kSynthesizer,
                ": biases must be empty or one per weight (", weights.size(), "), got ",
                biases.size());
  for (size_t i = 0; i < biases.size(); ++i) {
    const std::string name = "biases[" + std::to_string(i) + "]";
    check_like(name.c_str(), biases[i], trigger);
    check_shape(name.c_str(), biases[i], {weights[i].size(0)});
  }
  FASTDNI_CHECK(context.has_value() == context_weight.has_value(), kSynthesizer,
                ": context and context_weight must be given together");
  FASTDNI_CHECK(!context_bias.has_value() || context_weight.has_value(), kSynthesizer,
                ": context_bias needs a context_weight");
  if (!context.has_value()) return;
  check_like("context", *context, trigger);
  check_like("context_weight", *context_weight, trigger);
  FASTDNI_CHECK(context_weight->dim() == 2 && context_weight->size(0) == weights[0].size(0),
                kSynthesizer, ": context_weight must be (", weights[0].size(0), ", C), got ",
                to_string(shape_of(*context_weight)));
  check_shape("context", *context, with_last(shape_of(trigger), context_weight->size(1)));
  if (context_bias.has_value()) {
    check_like("context_bias", *context_bias, trigger);
    check_shape("context_bias", *context_bias, {weights[0].size(0)});
  }
}

void check_synthesizer_bwd(const Tensor& target, const Tensor& prediction, const Tensors& hidden,
                           const Tensor& trigger, const OptionalTensor& context,
                           const Tensors& weights, bool /* bias */, const std::string& reduction) {
  check_weights(trigger, weights);
  const bool wide_target =
      trigger.scalar_type() == ScalarType::BFloat16 && target.scalar_type() == ScalarType::Float;
  if (!wide_target || target.device() != trigger.device()) check_like("target", target, trigger);
  check_like("prediction", prediction, trigger);
  check_shape("prediction", prediction, with_last(shape_of(trigger), weights.back().size(0)));
  check_shape("target", target, shape_of(prediction));
  FASTDNI_CHECK(hidden.size() + 1 == weights.size(), kSynthesizer, ": hidden must hold ",
                weights.size() - 1, " activations, got ", hidden.size());
  for (size_t i = 0; i < hidden.size(); ++i) {
    const std::string name = "hidden[" + std::to_string(i) + "]";
    check_like(name.c_str(), hidden[i], trigger);
    check_shape(name.c_str(), hidden[i], {rows_of(trigger), weights[i].size(0)});
  }
  if (context.has_value()) {
    check_like("context", *context, trigger);
    check_shape("context", *context,
                with_last(shape_of(trigger), context->dim() == 0 ? 0 : context->size(-1)));
  }
  reduction_divisor(kSynthesizer, reduction, prediction);
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastdni, m) {
  m.def(
      "synthesizer_fwd(Tensor trigger, Tensor? context, Tensor[] weights, Tensor[] biases, "
      "Tensor? context_weight, Tensor? context_bias, str precision=\"exact\") -> "
      "(Tensor prediction, Tensor[] hidden)");
  m.def(
      "synthesizer_bwd(Tensor target, Tensor prediction, Tensor[] hidden, Tensor trigger, "
      "Tensor? context, Tensor[] weights, bool bias, str reduction, str precision=\"exact\") -> "
      "(Tensor loss, Tensor[] grads)");
  m.def(
      "synthesizer_check(Tensor trigger, Tensor? context, Tensor[] weights, Tensor[] biases, "
      "Tensor? context_weight, Tensor? context_bias) -> ()");
  m.def(
      "synthesizer_bwd_check(Tensor target, Tensor prediction, Tensor[] hidden, Tensor trigger, "
      "Tensor? context, Tensor[] weights, bool bias, str reduction) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdni, CompositeExplicitAutograd, m) {
  m.impl("synthesizer_check", TORCH_BOX(&check_synthesizer));
  m.impl("synthesizer_bwd_check", TORCH_BOX(&check_synthesizer_bwd));
}

}  // namespace fastdni
