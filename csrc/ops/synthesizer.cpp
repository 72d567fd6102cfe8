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
#if defined(FASTDNI_CUDA)
#include "cuda/synthesizer.h"
#include "ops/cuda.h"
#include "ops/library_product.h"
#endif

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
                                                const OptionalTensor& context_bias,
                                                const std::string& /*products*/) {
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
                                                const std::string& reduction,
                                                const std::string& /*products*/) {
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

// ---- on a GPU ----

#if defined(FASTDNI_CUDA)

// Multiply-adds of a product from which on torch's library makes it; as in sweep_cuda.cpp.
bool is_large(int64_t rows, int64_t columns, int64_t depth) {
  return static_cast<double>(rows) * columns * depth >= static_cast<double>(cuda::library_from());
}

void check_cuda_dtype(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  FASTDNI_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp,
                ": on a GPU trigger must be float32 or float64, got ", to_string(dtype));
}

// c = a w^T, or a w where the weight lies transposed, into the op's hands: as operands of a kernel,
// or made here by torch's library and kept in `made`.
template <class T>
cuda::Instruction product_of(const Tensor& a, const Tensor& weight, bool transposed,
                             OptionalTensor& made) {
  cuda::Instruction op;
  const int64_t rows = a.size(0), depth = a.size(1), columns = weight.size(transposed ? 1 : 0);
  op.columns = static_cast<int32_t>(columns);
  op.depth = static_cast<int32_t>(depth);
  op.transposed = transposed;
  if (is_large(rows, columns, depth)) {
    made = empty(a, {rows, columns});
    library_product(a, {made->data_ptr(), rows, columns, false}, {a.data_ptr(), rows, depth, false},
                    {weight.data_ptr(), depth, columns, !transposed});
    op.a = cuda::Operand::address(made->data_ptr());
  } else {
    op.a = cuda::Operand::address(a.data_ptr());
    op.weight = cuda::Operand::address(weight.data_ptr());
  }
  return op;
}

template <class T>
cuda::SweepStep<T> step_of(const Tensor& rows, const std::string& products) {
  cuda::SweepStep<T> step{};
  step.batch = rows.size(0);
  step.divisor = 1;
  step.products = products_named(products);
  return step;
}

template <class T>
void launch_layer(const cuda::SweepStep<T>& step, const cuda::Instruction& op,
                  cudaStream_t stream) {
  if (step.batch == 0 || op.columns == 0) return;
  cuda::check(kOp, cuda::launch_synthesizer_layer(step, op, stream));
}

const void* address_of(const OptionalTensor& tensor) {
  return tensor ? tensor->data_ptr() : nullptr;
}

std::tuple<Tensor, Tensors> synthesizer_fwd_cuda(const Tensor& trigger,
                                                 const OptionalTensor& context,
                                                 const Tensors& weights, const Tensors& biases,
                                                 const OptionalTensor& context_weight,
                                                 const OptionalTensor& context_bias,
                                                 const std::string& products) {
  check_synthesizer(trigger, context, weights, biases, context_weight, context_bias);
  check_cuda_dtype(trigger);
  const cuda::OnDevice device(trigger);
  Tensors hidden;
  Tensor layer_input = as_matrix(as_contiguous(trigger));
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool last = i + 1 == weights.size();
    const Tensor weight = as_contiguous(weights[i]);
    OptionalTensor bias, added, made, ctx, ctx_weight;
    if (!biases.empty()) bias = as_contiguous(biases[i]);
    if (i == 0 && context_bias.has_value()) added = as_contiguous(*context_bias);
    if (i == 0 && context.has_value()) {
      ctx = as_matrix(as_contiguous(*context));
      ctx_weight = as_contiguous(*context_weight);
    }
    const Tensor y = empty(layer_input, {layer_input.size(0), weight.size(0)});
    with_dtype(trigger.scalar_type(), [&](auto scalar) {
      using T = decltype(scalar);
      if constexpr (!std::is_same_v<T, bfloat16>) {
        cuda::SweepStep<T> step = step_of<T>(layer_input, products);
        cuda::Instruction op = product_of<T>(layer_input, weight, false, made);
        op.bias = cuda::Operand::address(address_of(bias));
        op.second_bias = cuda::Operand::address(address_of(added));
        op.activation = last ? Activation::identity : Activation::relu;
        op.out = cuda::Operand::address(y.data_ptr());
        if (ctx && ctx->size(1) > 0) {
          step.context = data<T>(*ctx);
          op.context = static_cast<int32_t>(ctx->size(1));
          op.context_weight = cuda::Operand::address(ctx_weight->data_ptr());
        }
        launch_layer(step, op, device.stream());
      }
    });
    if (!last) hidden.push_back(y);
    layer_input = y;
  }
  const Shape shape = with_last(shape_of(trigger), layer_input.size(1));
  return {shape.size() == 2 ? layer_input : view(layer_input, shape, contiguous_strides(shape)),
          hidden};
}

std::tuple<Tensor, Tensors> synthesizer_bwd_cuda(const Tensor& target, const Tensor& prediction,
                                                 const Tensors& hidden, const Tensor& trigger,
                                                 const OptionalTensor& context,
                                                 const Tensors& weights, bool bias,
                                                 const std::string& reduction,
                                                 const std::string& products) {
  check_synthesizer_bwd(target, prediction, hidden, trigger, context, weights, bias, reduction);
  check_cuda_dtype(trigger);
  const cuda::OnDevice device(trigger);
  const double divisor = reduction_divisor(kOp, reduction, prediction);
  const Tensor p = as_matrix(as_contiguous(prediction)), t = as_matrix(as_contiguous(target));
  const Tensor input = as_matrix(as_contiguous(trigger));
  const Tensor loss = empty(prediction, {});
  Tensors weight_grads, bias_grads, of_context;
  for (const Tensor& weight : weights) weight_grads.push_back(empty(weight, shape_of(weight)));
  for (size_t i = 0; bias && i < weights.size(); ++i) {
    bias_grads.push_back(empty(weights[i], {weights[i].size(0)}));
  }
  const int64_t rows = p.size(0), columns = p.size(1);
  const auto pieces = [](int64_t count, int64_t of) { return (count + of - 1) / of; };
  const Tensor partials =
      empty(p, {pieces(rows, cuda::kSweepRows) * pieces(columns, cuda::kSweepColumns)});

  with_dtype(prediction.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    if constexpr (!std::is_same_v<T, bfloat16>) {
      cuda::SweepStep<T> step = step_of<T>(p, products);
      step.divisor = divisor;
      step.workspace = mutable_data<T>(partials);
      // grad = 2 / divisor (prediction - target)
      Tensor grad = empty(p, shape_of(p));
      cuda::Instruction error;
      error.columns = static_cast<int32_t>(columns);
      error.finish = cuda::Finish::regress;
      error.a = cuda::Operand::address(t.data_ptr());
      error.other = cuda::Operand::address(p.data_ptr());
      error.out = cuda::Operand::address(grad.data_ptr());
      error.partials = 0;
      launch_layer(step, error, device.stream());
      // The gradients of a layer (or of the context's weight), given that of its output.
      const auto finish = [&](const Tensor& of_input, const Tensor& weight_grad,
                              const Tensor* bias_grad, const Tensor* second, bool with_loss) {
        cuda::SynthesizerGradient<T> args{};
        args.grad = data<T>(grad);
        args.input = data<T>(of_input);
        args.rows = rows;
        args.outputs = static_cast<int32_t>(grad.size(1));
        args.inputs = static_cast<int32_t>(of_input.size(1));
        if (is_large(args.outputs, args.inputs, rows)) {
          library_product(grad, {weight_grad.data_ptr(), args.outputs, args.inputs, false},
                          {grad.data_ptr(), args.outputs, rows, true},
                          {of_input.data_ptr(), rows, args.inputs, false});
        } else {
          args.weight = mutable_data<T>(weight_grad);
        }
        args.bias = bias_grad == nullptr ? nullptr : mutable_data<T>(*bias_grad);
        args.second_bias = second == nullptr ? nullptr : mutable_data<T>(*second);
        args.loss = with_loss ? mutable_data<T>(loss) : nullptr;
        args.partials = data<T>(partials);
        args.partial_count = partials.size(0);
        args.divisor = divisor;
        cuda::check(kOp, cuda::launch_synthesizer_gradient(args, step.products, device.stream()));
      };
      for (size_t i = weights.size(); i-- > 0;) {
        const Tensor layer_input = i == 0 ? input : as_contiguous(hidden[i - 1]);
        const bool last = i + 1 == weights.size();
        // q enters where b_0 does, so it has the same gradient.
        const bool with_q = i == 0 && context.has_value() && bias;
        OptionalTensor q;
        if (with_q) q = empty(weights[0], {weights[0].size(0)});
        finish(layer_input, weight_grads[i], bias ? &bias_grads[i] : nullptr, q ? &*q : nullptr,
               last);
        if (i == 0 && context.has_value()) {
          of_context.push_back(empty(weights[0], {weights[0].size(0), context->size(-1)}));
          finish(as_matrix(as_contiguous(*context)), of_context[0], nullptr, nullptr, false);
          if (q) of_context.push_back(*q);
        }
        if (i == 0) break;
        OptionalTensor made;
        const Tensor weight = as_contiguous(weights[i]);
        cuda::Instruction below = product_of<T>(grad, weight, true, made);
        below.finish = cuda::Finish::differentiate;
        below.activation = Activation::relu;
        below.other = cuda::Operand::address(layer_input.data_ptr());
        const Tensor next = empty(grad, {rows, weight.size(1)});
        below.out = cuda::Operand::address(next.data_ptr());
        launch_layer(step, below, device.stream());
        grad = next;
      }
    }
  });
  Tensors grads = std::move(weight_grads);
  grads.insert(grads.end(), bias_grads.begin(), bias_grads.end());
  grads.insert(grads.end(), of_context.begin(), of_context.end());
  return {loss, grads};
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdni, m) {
  m.def(
      "synthesizer_fwd(Tensor trigger, Tensor? context, Tensor[] weights, Tensor[] biases, "
      "Tensor? context_weight, Tensor? context_bias, str products=\"exact\") -> "
      "(Tensor prediction, Tensor[] hidden)");
  m.def(
      "synthesizer_bwd(Tensor target, Tensor prediction, Tensor[] hidden, Tensor trigger, "
      "Tensor? context, Tensor[] weights, bool bias, str reduction, str products=\"exact\") -> "
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
#if defined(FASTDNI_CUDA_ON_HOST)
  m.impl("synthesizer_fwd", TORCH_BOX(&synthesizer_fwd_cuda));
  m.impl("synthesizer_bwd", TORCH_BOX(&synthesizer_bwd_cuda));
#else
  m.impl("synthesizer_fwd", TORCH_BOX(&synthesizer_fwd_cpu));
  m.impl("synthesizer_bwd", TORCH_BOX(&synthesizer_bwd_cpu));
#endif
}

#if defined(FASTDNI_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastdni, CUDA, m) {
  m.impl("synthesizer_fwd", TORCH_BOX(&synthesizer_fwd_cuda));
  m.impl("synthesizer_bwd", TORCH_BOX(&synthesizer_bwd_cuda));
}
#endif

}  // namespace fastdni
