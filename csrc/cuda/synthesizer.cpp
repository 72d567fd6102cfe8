// The synthesizer ops on a GPU: a launch a layer, and one for each weight's gradient.
#include "cuda/kernels/synthesizer.h"

#include <type_traits>

#include "common/names.h"
#include "cuda/device.h"
#include "cuda/kernels/sweep_library.h"
#include "cuda/library_product.h"
#include "ops/reduction.h"
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

void check_cuda_dtype(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  FASTDNI_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kSynthesizer,
                ": on a GPU trigger must be float32 or float64, got ", to_string(dtype));
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
SweepStep<T> step_of(const Tensor& rows, const std::string& precision) {
  SweepStep<T> step{};
  step.batch = rows.size(0);
  step.divisor = 1;
  step.precision = precision_named(kSynthesizer, precision);
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

std::tuple<Tensor, Tensors> synthesizer_fwd(const Tensor& trigger, const OptionalTensor& context,
                                            const Tensors& weights, const Tensors& biases,
                                            const OptionalTensor& context_weight,
                                            const OptionalTensor& context_bias,
                                            const std::string& precision) {
  check_synthesizer(trigger, context, weights, biases, context_weight, context_bias);
  check_cuda_dtype(trigger);
  const OnDevice device(trigger);
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
    with_dtype(trigger.scalar_type(), [&](auto scalar) {
      using T = decltype(scalar);
      if constexpr (!std::is_same_v<T, bfloat16>) {
        SweepStep<T> step = step_of<T>(layer_input, precision);
        Instruction op = product_of(layer_input, weight, false, step.precision, large);
        op.bias = Operand::address(address_of(bias));
        op.second_bias = Operand::address(address_of(added));
        op.activation = last ? Activation::identity : Activation::relu;
        op.out = Operand::address(y.data_ptr());
        if (ctx && ctx->size(1) > 0) {
          step.context = data<T>(*ctx);
          op.context = static_cast<int32_t>(ctx->size(1));
          op.context_weight = Operand::address(ctx_weight->data_ptr());
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

std::tuple<Tensor, Tensors> synthesizer_bwd(const Tensor& target, const Tensor& prediction,
                                            const Tensors& hidden, const Tensor& trigger,
                                            const OptionalTensor& context, const Tensors& weights,
                                            bool bias, const std::string& reduction,
                                            const std::string& precision) {
  check_synthesizer_bwd(target, prediction, hidden, trigger, context, weights, bias, reduction);
  check_cuda_dtype(trigger);
  const OnDevice device(trigger);
  const double divisor = reduction_divisor(kSynthesizer, reduction, prediction);
  const Tensor p = as_matrix(as_contiguous(prediction)), t = as_matrix(as_contiguous(target));
  const Tensor input = as_matrix(as_contiguous(trigger));
  const Tensor loss = empty(prediction, {});
  Tensors weight_grads, bias_grads, of_context;
  for (const Tensor& weight : weights) weight_grads.push_back(empty(weight, shape_of(weight)));
  for (size_t i = 0; bias && i < weights.size(); ++i) {
    bias_grads.push_back(empty(weights[i], {weights[i].size(0)}));
  }
  const int64_t rows = p.size(0), columns = p.size(1);
  const int64_t row_blocks = (rows + kSweepRows - 1) / kSweepRows;
  const Tensor partials = empty(p, {row_blocks * column_tiles(columns)});

  with_dtype(prediction.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    if constexpr (!std::is_same_v<T, bfloat16>) {
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
      error.partials = 0;
      launch_layer(step, error, device.stream());
      // The gradients of a layer (or of the context's weight), given that of its output.
      const auto finish = [&](const Tensor& of_input, const Tensor& weight_grad,
                              const Tensor* bias_grad, const Tensor* second, bool with_loss) {
        SynthesizerGradient<T> args{};
        args.grad = data<T>(grad);
        args.input = data<T>(of_input);
        args.rows = rows;
        args.outputs = static_cast<int32_t>(grad.size(1));
        args.inputs = static_cast<int32_t>(of_input.size(1));
        if (is_large(grad, step.precision, args.outputs, args.inputs, rows)) {
          multiply(grad, step.precision, {weight_grad.data_ptr(), args.outputs, args.inputs, false},
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
        check(kSynthesizer, launch_synthesizer_gradient(args, step.precision, device.stream()));
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
        OptionalTensor large;
        const Tensor weight = as_contiguous(weights[i]);
        Instruction below = product_of(grad, weight, true, step.precision, large);
        below.finish = Finish::differentiate;
        below.activation = Activation::relu;
        below.other = Operand::address(layer_input.data_ptr());
        const Tensor next = empty(grad, {rows, weight.size(1)});
        below.out = Operand::address(next.data_ptr());
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdni, FASTDNI_CUDA_KEY, m) {
  m.impl("synthesizer_fwd", TORCH_BOX(&synthesizer_fwd));
  m.impl("synthesizer_bwd", TORCH_BOX(&synthesizer_bwd));
}

}  // namespace fastdni::cuda
