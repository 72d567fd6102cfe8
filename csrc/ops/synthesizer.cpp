// The synthesizer M(h, ctx), a perceptron that predicts a gradient (or an activation), and its
// regression on what really arrived.
//
//   forward    a_0 = h W_0^T + b_0 + ctx Q^T + q;   a_i = relu(a_{i-1}) W_i^T + b_i;   g^ = a_n
//   backward   e = g^ - target;  loss = sum(e^2) / divisor;  every parameter's gradient of the loss
//
// No gradient goes to h or to ctx: M is never differentiated with respect to them.
#include "cpu/synthesizer.h"

#include <numeric>
#include <optional>

#include "ops/product.h"
#include "ops/reduction.h"
#include "ops/tensor.h"

namespace fastdni {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

constexpr const char* kOp = "synthesizer";

void check_like(const char* name, const Tensor& tensor, const Tensor& trigger) {
  FASTDNI_CHECK(tensor.device() == trigger.device(), kOp, ": ", name,
                " must be on trigger's device");
  FASTDNI_CHECK(tensor.scalar_type() == trigger.scalar_type(), kOp, ": ", name,
                " must have trigger's dtype ", to_string(trigger.scalar_type()), ", got ",
                to_string(tensor.scalar_type()));
}

void check_shape(const char* name, const Tensor& tensor, const Shape& expected) {
  FASTDNI_CHECK(shape_of(tensor) == expected, kOp, ": ", name, " must be ", to_string(expected),
                ", got ", to_string(shape_of(tensor)));
}

Shape with_last(Shape shape, int64_t last) {
  shape.back() = last;
  return shape;
}

void check_weights(const Tensor& trigger, const Tensors& weights) {
  FASTDNI_CHECK(!weights.empty(), kOp, ": weights must hold at least one matrix, got none");
  FASTDNI_CHECK(trigger.dim() >= 1, kOp, ": trigger must be (..., K), got a 0-d tensor");
  int64_t width = trigger.size(-1);
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string name = "weights[" + std::to_string(i) + "]";
    check_like(name.c_str(), weights[i], trigger);
    FASTDNI_CHECK(weights[i].dim() == 2, kOp, ": ", name, " must be (N, K), got ",
                  to_string(shape_of(weights[i])));
    if (i == 0) {
      FASTDNI_CHECK(weights[0].size(1) == width, kOp, ": trigger must be (..., ",
                    weights[0].size(1), ") to meet the first weight ",
                    to_string(shape_of(weights[0])), ", got ", to_string(shape_of(trigger)));
    } else {
      check_shape(name.c_str(), weights[i], {weights[i].size(0), width});
    }
    width = weights[i].size(0);
  }
}

void check_synthesizer(const Tensor& trigger, const OptionalTensor& context, const Tensors& weights,
                       const Tensors& biases, const OptionalTensor& context_weight,
                       const OptionalTensor& context_bias) {
  check_weights(trigger, weights);
  FASTDNI_CHECK(biases.empty() || biases.size() == weights.size(), kOp,
                ": biases must be empty or one per weight (", weights.size(), "), got ",
                biases.size());
  for (size_t i = 0; i < biases.size(); ++i) {
    const std::string name = "biases[" + std::to_string(i) + "]";
    check_like(name.c_str(), biases[i], trigger);
    check_shape(name.c_str(), biases[i], {weights[i].size(0)});
  }
  FASTDNI_CHECK(context.has_value() == context_weight.has_value(), kOp,
                ": context and context_weight must be given together");
  FASTDNI_CHECK(!context_bias.has_value() || context_weight.has_value(), kOp,
                ": context_bias needs a context_weight");
  if (!context.has_value()) return;
  check_like("context", *context, trigger);
  check_like("context_weight", *context_weight, trigger);
  FASTDNI_CHECK(context_weight->dim() == 2 && context_weight->size(0) == weights[0].size(0), kOp,
                ": context_weight must be (", weights[0].size(0), ", C), got ",
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
  FASTDNI_CHECK(hidden.size() + 1 == weights.size(), kOp, ": hidden must hold ", weights.size() - 1,
                " activations, got ", hidden.size());
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
  reduction_divisor(kOp, reduction, prediction);
}

// One pass over a matrix, spread over threads by chunks of rows.
template <class Pass>
void for_chunks(const cpu::RowChunks& chunks, const Pass& pass) {
  constexpr int64_t kElementsPerTask = 16384;  // worth waking a thread for
  const int64_t per_chunk = std::max(chunks.rows_per_chunk * chunks.columns, int64_t{1});
  const int64_t grain = (kElementsPerTask + per_chunk - 1) / per_chunk;
  torch::stable::parallel_for(0, chunks.count(), grain, pass);
}

std::tuple<Tensor, Tensors> synthesizer_fwd_cpu(const Tensor& trigger,
                                                const OptionalTensor& context,
                                                const Tensors& weights, const Tensors& biases,
                                                const OptionalTensor& context_weight,
                                                const OptionalTensor& context_bias) {
  check_synthesizer(trigger, context, weights, biases, context_weight, context_bias);
  FASTDNI_CHECK(has_kernel(trigger.scalar_type()), kOp,
                ": trigger must be float32, float64 or bfloat16, got ",
                to_string(trigger.scalar_type()));
  Tensors hidden;
  Tensor layer_input = as_matrix(as_contiguous(trigger));
  for (size_t i = 0; i < weights.size(); ++i) {
    OptionalTensor bias, added;
    if (!biases.empty()) bias = as_contiguous(biases[i]);
    if (i == 0 && context_bias.has_value()) added = as_contiguous(*context_bias);
    Tensor y = cpu::product(layer_input, weights[i]);
    if (i == 0 && context.has_value()) {
      cpu::add_product(y, as_matrix(as_contiguous(*context)), *context_weight);
    }
    const bool last = i + 1 == weights.size();
    with_dtype(y.scalar_type(), [&](auto scalar) {
      using T = decltype(scalar);
      const cpu::FinishLayer<T> args{mutable_data<T>(y), bias ? data<T>(*bias) : nullptr,
                                     added ? data<T>(*added) : nullptr, !last};
      const cpu::RowChunks chunks(y.size(0), y.size(1));
      cpu::with_isa([&](auto isa) {
        for_chunks(chunks, [&](int64_t first, int64_t end) {
          cpu::finish_layer<isa.value, T>(args, chunks, first, end);
        });
      });
    });
    if (!last) hidden.push_back(y);
    layer_input = y;
  }
  const Shape shape = with_last(shape_of(trigger), layer_input.size(1));
  return {shape.size() == 2 ? layer_input : view(layer_input, shape, contiguous_strides(shape)),
          hidden};
}

// The gradients of the layers' weights and biases, from the last layer to the first.
template <class T>
class Backward {
 public:
  using A = accumulate_t<T>;

  Backward(size_t layers, bool bias) : weight_grads(layers), bias_grads(bias ? layers : 0) {}

  Tensors weight_grads, bias_grads;
  double loss = 0;

  // grad = 2 / divisor (prediction - target), of the last layer
  Tensor start(const Tensor& prediction, const Tensor& target, double divisor) {
    const Tensor p = as_matrix(prediction), t = as_matrix(target);
    Tensor grad = empty(p, shape_of(p));
    const cpu::RowChunks chunks(p.size(0), p.size(1));
    std::vector<double> squared(chunks.count());
    std::vector<A> column_sums(chunks.count() * chunks.columns);
    const auto run = [&](auto target_scalar) {
      using Target = decltype(target_scalar);
      const cpu::SynthesisError<T, Target> args{
          data<T>(p),     data<Target>(t),    mutable_data<T>(grad),
          squared.data(), column_sums.data(), static_cast<A>(2.0 / divisor)};
      cpu::with_isa([&](auto isa) {
        for_chunks(chunks, [&](int64_t first, int64_t last) {
          cpu::synthesis_error<isa.value, T, Target>(args, chunks, first, last);
        });
      });
    };
    if (t.scalar_type() == p.scalar_type()) {
      run(T{});
    } else {
      run(A{});
    }
    loss = std::accumulate(squared.begin(), squared.end(), 0.0) / divisor;
    if (!bias_grads.empty()) bias_grads.back() = sum_columns(grad, column_sums, chunks);
    return grad;
  }

  // grad of layer i -> grad of layer i - 1, through the ReLU between them
  Tensor step_down(const Tensor& grad, const Tensor& weight, const Tensor& hidden, size_t layer) {
    Tensor below = cpu::product(grad, transposed(weight));
    const cpu::RowChunks chunks(below.size(0), below.size(1));
    std::vector<A> column_sums(chunks.count() * chunks.columns);
    const cpu::ReluBackward<T> args{mutable_data<T>(below), data<T>(hidden), column_sums.data()};
    cpu::with_isa([&](auto isa) {
      for_chunks(chunks, [&](int64_t first, int64_t last) {
        cpu::relu_backward<isa.value, T>(args, chunks, first, last);
      });
    });
    if (!bias_grads.empty()) bias_grads[layer - 1] = sum_columns(below, column_sums, chunks);
    return below;
  }

 private:
  static Tensor sum_columns(const Tensor& like, const std::vector<A>& column_sums,
                            const cpu::RowChunks& chunks) {
    Tensor sum = empty(like, {chunks.columns});
    cpu::with_isa([&](auto isa) {
      cpu::add_chunks<isa.value, T>(column_sums.data(), mutable_data<T>(sum), chunks);
    });
    return sum;
  }
};

std::tuple<Tensor, Tensors> synthesizer_bwd_cpu(const Tensor& target, const Tensor& prediction,
                                                const Tensors& hidden, const Tensor& trigger,
                                                const OptionalTensor& context,
                                                const Tensors& weights, bool bias,
                                                const std::string& reduction) {
  check_synthesizer_bwd(target, prediction, hidden, trigger, context, weights, bias, reduction);
  const double divisor = reduction_divisor(kOp, reduction, prediction);
  const Tensor input = as_matrix(as_contiguous(trigger));
  Tensor loss = empty_accumulate(prediction, {});
  Tensors grads;

  with_dtype(prediction.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    Backward<T> backward(weights.size(), bias);
    // The gradient that arrives is often an expanded scalar.
    Tensor grad = backward.start(as_contiguous(prediction), as_contiguous(target), divisor);
    for (size_t i = weights.size(); i-- > 0;) {
      const Tensor layer_input = i == 0 ? input : as_contiguous(hidden[i - 1]);
      backward.weight_grads[i] = cpu::weight_gradient(grad, layer_input);
      if (i > 0) grad = backward.step_down(grad, weights[i], layer_input, i);
    }
    *mutable_data<accumulate_t<T>>(loss) = static_cast<accumulate_t<T>>(backward.loss);

    grads = std::move(backward.weight_grads);
    grads.insert(grads.end(), backward.bias_grads.begin(), backward.bias_grads.end());
    if (context.has_value()) {
      const Tensor c = as_matrix(as_contiguous(*context));
      grads.push_back(cpu::weight_gradient(grad, c));
      // q enters where b_0 does, so it has the same gradient.
      if (bias) grads.push_back(torch::stable::clone(backward.bias_grads[0]));
    }
  });
  return {loss, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdni, m) {
  m.def(
      "synthesizer_fwd(Tensor trigger, Tensor? context, Tensor[] weights, Tensor[] biases, "
      "Tensor? context_weight, Tensor? context_bias) -> (Tensor prediction, Tensor[] hidden)");
  m.def(
      "synthesizer_bwd(Tensor target, Tensor prediction, Tensor[] hidden, Tensor trigger, "
      "Tensor? context, Tensor[] weights, bool bias, str reduction) -> "
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

STABLE_TORCH_LIBRARY_IMPL(fastdni, CPU, m) {
  m.impl("synthesizer_fwd", TORCH_BOX(&synthesizer_fwd_cpu));
  m.impl("synthesizer_bwd", TORCH_BOX(&synthesizer_bwd_cpu));
}

}  // namespace fastdni
