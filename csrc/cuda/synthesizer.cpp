// The synthesizer ops on a GPU: a launch a layer, and one for each weight's gradient.
#include "cuda/synthesizer.h"

#include "common/names.h"
#include "cuda/device.h"
#include "cuda/kernels/sweep_library.h"
#include "cuda/library_product.h"
#include "ops/synthesizer.h"

namespace fastdni::cuda {
namespace {

// Whether torch's library makes a product; as in sweep.cpp.
bool is_large(const Tensor& like, Precision precision, int64_t rows, int64_t columns,
              int64_t depth) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  const int64_t from = library_from(precision, wide, like.is_cpu());
  const bool is_long = depth >= kLongBatch && from < std::numeric_limits<int64_t>::max();
  return is_long || static_cast<double>(rows) * columns * depth >= static_cast<double>(from);
}

// out = a b by it.
void multiply(const Tensor& like, Precision precision, const MatrixAt& out, const MatrixAt& a,
              const MatrixAt& b) {
  if (precision != Precision::bfloat16) return library_product(like, out, a, b);
  const int64_t elements = a.columns * (a.rows + b.columns);
  const Tensor narrow = empty(like, {elements}, aoti_torch_dtype_bfloat16());
  library_product_bfloat16(like, out, a, b, narrow.data_ptr());
}

// c = a w^T, or a w where the weight lies transposed, into the op's hands: as operands of a kernel,
// or made here by torch's library and kept in `large`.
Instruction product_of(const Tensor& a, const Tensor& weight, bool transposed, Precision precision,
                       OptionalTensor& large) {
  Instruction op;
  const int64_t rows = a.size(0), depth = a.size(1), columns = weight.size(transposed ? 1 : 0);
  op.columns = static_cast<int32_t>(columns);
  op.depth = static_cast<int32_t>(depth);
  op.transposed = transposed;
  if (is_large(a, precision, rows, columns, depth)) {
    large = empty(a, {rows, columns});
    multiply(a, precision, {large->data_ptr(), rows, columns, false},
             {a.data_ptr(), rows, depth, false}, {weight.data_ptr(), depth, columns, !transposed});
    op.a = Operand::address(large->data_ptr());
  } else {
    op.a = Operand::address(a.data_ptr());
    op.weight = Operand::address(weight.data_ptr());
  }
  return op;
}

template <class T>
SweepStep<T> step_of(const Tensor& rows, Precision precision) {
  SweepStep<T> step{};
  step.batch = rows.size(0);
  step.divisor = 1;
  step.precision = precision;
  return step;
}

template <class T>
void launch_layer(const SweepStep<T>& step, const Instruction& op, cudaStream_t stream) {
  if (step.batch == 0 || op.columns == 0) return;
  check(kSynthesizer, launch_synthesizer_layer(step, op, stream));
}

const void* address_of(const OptionalTensor& tensor) {
  return tensor ? tensor->data_ptr() : nullptr;
}

// Whether a gradient is but to be written to where it is wanted.
template <class T>
bool is_written(const SynthesizerParameter<T>& p) {
  return p.parameter.update.rule == Rule::gradient && p.parameter.update.a == 0;
}

}  // namespace

void check_cuda_dtype(const std::string& caller, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  FASTDNI_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, caller,
                ": on a GPU trigger must be float32 or float64, got ", to_string(dtype));
}

std::tuple<Tensor, Tensors> evaluate_synthesizer(const Tensor& trigger,
                                                 const OptionalTensor& context,
                                                 const Tensors& weights, const Tensors& biases,
                                                 const OptionalTensor& context_weight,
                                                 const OptionalTensor& context_bias,
                                                 Precision precision, cudaStream_t stream) {
  Tensors hidden;
  Tensor layer_input = as_matrix(as_contiguous(trigger));
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool last = i + 1 == weights.size();
    const Tensor weight = as_contiguous(weights[i]);
    OptionalTensor bias, added, large, ctx, ctx_weight;
    if (!biases.empty()) bias = as_contiguous(biases[i]);
    if (i == 0 && context_bias.has_value()) added = as_contiguous(*context_bias);
    if (i == 0 && context.has_value()) {
      ctx = as_matrix(as_contiguous(*context));
      ctx_weight = as_contiguous(*context_weight);
    }
    const Tensor y = empty(layer_input, {layer_input.size(0), weight.size(0)});
    with_cuda_dtype(trigger, [&](auto scalar) {
      using T = decltype(scalar);
      SweepStep<T> step = step_of<T>(layer_input, precision);
      Instruction op = product_of(layer_input, weight, false, precision, large);
      op.bias = Operand::address(address_of(bias));
      op.second_bias = Operand::address(address_of(added));
      op.activation = last ? Activation::identity : Activation::relu;
      op.out = Operand::address(y.data_ptr());
      if (ctx && ctx->size(1) > 0) {
        step.context = data<T>(*ctx);
        op.context = static_cast<int32_t>(ctx->size(1));
        op.context_weight = Operand::address(ctx_weight->data_ptr());
      }
      launch_layer(step, op, stream);
    });
    if (!last) hidden.push_back(y);
    layer_input = y;
  }
  const Shape shape = with_last(shape_of(trigger), layer_input.size(1));
  return {shape.size() == 2 ? layer_input : view(layer_input, shape, contiguous_strides(shape)),
          hidden};
}

template <class T>
Tensor regress_synthesizer(const Tensor& target, const Tensor& prediction, const Tensors& hidden,
                           const Tensor& trigger, const OptionalTensor& context,
                           const Tensors& weights, bool bias, double divisor,
                           const OptionalTensor& difference,
                           const std::vector<SynthesizerParameter<T>>& parameters,
                           Precision precision, cudaStream_t stream) {
  const Tensor p = as_matrix(as_contiguous(prediction)), t = as_matrix(as_contiguous(target));
  const Tensor input = as_matrix(as_contiguous(trigger));
  const Tensor loss = empty(prediction, {});
  const size_t layers = weights.size(), biases_begin = layers;
  const size_t context_begin = bias ? 2 * layers : layers;
  const int64_t rows = p.size(0), columns = p.size(1);
  const int64_t row_blocks = (rows + kSweepRows - 1) / kSweepRows;
  const Tensor partials = empty(p, {row_blocks * column_tiles(columns)});

  SweepStep<T> step = step_of<T>(p, precision);
  step.divisor = divisor;
  step.scale = static_cast<T>(2 / divisor);
  step.workspace = mutable_data<T>(partials);
  // grad = 2 / divisor (prediction - target)
  Tensor grad = empty(p, shape_of(p));
  Instruction error;
  error.columns = static_cast<int32_t>(columns);
  error.finish = Finish::regress;
  error.a = Operand::address(t.data_ptr());
  error.other = Operand::address(p.data_ptr());
  error.out = Operand::address(grad.data_ptr());
  error.dz = Operand::address(address_of(difference));
  error.partials = 0;
  launch_layer(step, error, stream);
  // The gradients of a layer (or of the context's weight) with their updates, given that of its
  // output.
  const auto finish = [&](const Tensor& of_output, const Tensor& of_input,
                          const SynthesizerParameter<T>& weight,
                          const SynthesizerParameter<T>& own_bias,
                          const SynthesizerParameter<T>& second, bool with_loss) {
    SynthesizerGradient<T> args{};
    args.grad = data<T>(of_output);
    args.input = data<T>(of_input);
    args.rows = rows;
    args.outputs = static_cast<int32_t>(of_output.size(1));
    args.inputs = static_cast<int32_t>(of_input.size(1));
    args.weight = weight;
    args.bias = own_bias;
    args.second_bias = second;
    OptionalTensor ready;
    const bool updated = weight.parameter.update.rule != Rule::none;
    if (updated && is_large(of_output, precision, args.outputs, args.inputs, rows)) {
      void* to = weight.parameter.first;
      if (is_written(weight)) {
        args.weight = {};
      } else {
        ready = empty(of_output, {args.outputs, args.inputs});
        to = ready->data_ptr();
        args.ready = data<T>(*ready);
      }
      multiply(of_output, precision, {to, args.outputs, args.inputs, false},
               {of_output.data_ptr(), args.outputs, rows, true},
               {of_input.data_ptr(), rows, args.inputs, false});
    }
    args.loss = with_loss ? mutable_data<T>(loss) : nullptr;
    args.partials = data<T>(partials);
    args.partial_count = partials.size(0);
    args.divisor = divisor;
    check(kSynthesizer, launch_synthesizer_gradient(args, precision, stream));
  };
  for (size_t i = layers; i-- > 0;) {
    const Tensor layer_input = i == 0 ? input : as_contiguous(hidden[i - 1]);
    Tensor next = grad;
    OptionalTensor large;
    if (i > 0) {  // before the weight is updated
      const Tensor weight = as_contiguous(weights[i]);
      Instruction below = product_of(grad, weight, true, precision, large);
      below.finish = Finish::differentiate;
      below.activation = Activation::relu;
      below.other = Operand::address(layer_input.data_ptr());
      next = empty(grad, {rows, weight.size(1)});
      below.out = Operand::address(next.data_ptr());
      launch_layer(step, below, stream);
    }
    // q enters where b_0 does, so it has the same gradient.
    const bool with_q = i == 0 && context.has_value() && bias;
    finish(grad, layer_input, parameters[i],
           bias ? parameters[biases_begin + i] : SynthesizerParameter<T>{},
           with_q ? parameters[context_begin + 1] : SynthesizerParameter<T>{}, i + 1 == layers);
    if (i == 0 && context.has_value()) {
      finish(grad, as_matrix(as_contiguous(*context)), parameters[context_begin], {}, {}, false);
    }
    grad = next;
  }
  return loss;
}

#define INSTANTIATE(T)                                                                    \
  template Tensor regress_synthesizer(                                                    \
      const Tensor&, const Tensor&, const Tensors&, const Tensor&, const OptionalTensor&, \
      const Tensors&, bool, double, const OptionalTensor&,                                \
      const std::vector<SynthesizerParameter<T>>&, Precision, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

namespace {

std::tuple<Tensor, Tensors> synthesizer_fwd(const Tensor& trigger, const OptionalTensor& context,
                                            const Tensors& weights, const Tensors& biases,
                                            const OptionalTensor& context_weight,
                                            const OptionalTensor& context_bias,
                                            const std::string& precision) {
  check_synthesizer(kSynthesizer, trigger, context, weights, biases, context_weight, context_bias);
  check_cuda_dtype(kSynthesizer, trigger);
  const OnDevice device(trigger);
  return evaluate_synthesizer(trigger, context, weights, biases, context_weight, context_bias,
                              precision_named(kSynthesizer, precision), device.stream());
}

std::tuple<Tensor, Tensors> synthesizer_bwd(const Tensor& target, const Tensor& prediction,
                                            const Tensors& hidden, const Tensor& trigger,
                                            const OptionalTensor& context, const Tensors& weights,
                                            bool bias, const std::string& reduction,
                                            const std::string& precision,
                                            std::optional<double> scale) {
  const double divisor = check_synthesizer_bwd(target, prediction, hidden, trigger, context,
                                               weights, reduction, scale);
  check_cuda_dtype(kSynthesizer, trigger);
  const OnDevice device(trigger);
  Tensors grads;
  for (const Tensor& weight : weights) grads.push_back(empty(weight, shape_of(weight)));
  for (size_t i = 0; bias && i < weights.size(); ++i) {
    grads.push_back(empty(weights[i], {weights[i].size(0)}));
  }
  if (context.has_value()) {
    grads.push_back(empty(weights[0], {weights[0].size(0), context->size(-1)}));
    if (bias) grads.push_back(empty(weights[0], {weights[0].size(0)}));
  }
  Tensor loss;
  with_cuda_dtype(trigger, [&](auto scalar) {
    using T = decltype(scalar);
    std::vector<SynthesizerParameter<T>> handed_out(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
      handed_out[i].parameter.first = mutable_data<T>(grads[i]);
      handed_out[i].parameter.update.rule = Rule::gradient;
    }
    loss = regress_synthesizer(target, prediction, hidden, trigger, context, weights, bias, divisor,
                               {}, handed_out, precision_named(kSynthesizer, precision),
                               device.stream());
  });
  return {loss, grads};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdni, FASTDNI_CUDA_KEY, m) {
  m.impl("synthesizer_fwd", TORCH_BOX(&synthesizer_fwd));
  m.impl("synthesizer_bwd", TORCH_BOX(&synthesizer_bwd));
}

}  // namespace fastdni::cuda
