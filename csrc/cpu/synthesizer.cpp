// The synthesizer ops on the CPU: products by torch's libraries, and one fused pass after each.
#include "cpu/synthesizer.h"

#include <numeric>

#include "common/names.h"
#include "cpu/kernels/synthesizer.h"
#include "cpu/product.h"
#include "ops/synthesizer.h"

namespace fastdni::cpu {
namespace {

template <class Pass>
void for_chunks(const cpu::RowChunks& chunks, const Pass& pass) {
  constexpr int64_t kElementsPerTask = 16384;  // worth waking a thread for
  const int64_t per_chunk = std::max(chunks.kRows * chunks.columns, int64_t{1});
  const int64_t grain = (kElementsPerTask + per_chunk - 1) / per_chunk;
  torch::stable::parallel_for(0, chunks.count(), grain, pass);
}

}  // namespace

std::tuple<Tensor, Tensors> evaluate_synthesizer(const Tensor& trigger,
                                                 const OptionalTensor& context,
                                                 const Tensors& weights, const Tensors& biases,
                                                 const OptionalTensor& context_weight,
                                                 const OptionalTensor& context_bias) {
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

namespace {

// The gradients of the layers' weights and biases, from the last layer to the first.
template <class T>
class Backward {
 public:
  using A = accumulate_t<T>;

  Backward(size_t layers, bool bias) : weight_grads(layers), bias_grads(bias ? layers : 0) {}

  Tensors weight_grads, bias_grads;
  double loss = 0;

  // grad = 2 / divisor (prediction - target), of the last layer
  Tensor start(const Tensor& prediction, const Tensor& target, double divisor,
               const OptionalTensor& error) {
    const Tensor p = as_matrix(prediction), t = as_matrix(target);
    Tensor grad = empty(p, shape_of(p));
    const cpu::RowChunks chunks(p.size(0), p.size(1));
    std::vector<double> squared(chunks.count());
    std::vector<A> column_sums(chunks.count() * chunks.columns);
    const auto run = [&](auto target_scalar) {
      using Target = decltype(target_scalar);
      const cpu::SynthesisError<T, Target> args{data<T>(p),
                                                data<Target>(t),
                                                mutable_data<T>(grad),
                                                error ? mutable_data<A>(*error) : nullptr,
                                                squared.data(),
                                                column_sums.data(),
                                                static_cast<A>(2.0 / divisor)};
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

}  // namespace

std::tuple<Tensor, Tensors> regress_synthesizer(const Tensor& target, const Tensor& prediction,
                                                const Tensors& hidden, const Tensor& trigger,
                                                const OptionalTensor& context,
                                                const Tensors& weights, bool bias, double divisor,
                                                const OptionalTensor& error) {
  const Tensor input = as_matrix(as_contiguous(trigger));
  Tensor loss = empty_accumulate(prediction, {});
  Tensors grads;

  with_dtype(prediction.scalar_type(), [&](auto scalar) {
    using T = decltype(scalar);
    Backward<T> backward(weights.size(), bias);
    // The gradient that arrives is often an expanded scalar.
    Tensor grad = backward.start(as_contiguous(prediction), as_contiguous(target), divisor, error);
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

namespace {

std::tuple<Tensor, Tensors> synthesizer_fwd(const Tensor& trigger, const OptionalTensor& context,
                                            const Tensors& weights, const Tensors& biases,
                                            const OptionalTensor& context_weight,
                                            const OptionalTensor& context_bias,
                                            const std::string& precision) {
  check_synthesizer(kSynthesizer, trigger, context, weights, biases, context_weight, context_bias);
  precision_named(kSynthesizer, precision);  // exact whatever it is
  check_kernel_dtype(kSynthesizer, trigger);
  return evaluate_synthesizer(trigger, context, weights, biases, context_weight, context_bias);
}

std::tuple<Tensor, Tensors> synthesizer_bwd(const Tensor& target, const Tensor& prediction,
                                            const Tensors& hidden, const Tensor& trigger,
                                            const OptionalTensor& context, const Tensors& weights,
                                            bool bias, const std::string& reduction,
                                            const std::string& precision,
                                            std::optional<double> scale) {
  const double divisor = check_synthesizer_bwd(target, prediction, hidden, trigger, context,
                                               weights, reduction, scale);
  precision_named(kSynthesizer, precision);  // as above
  return regress_synthesizer(target, prediction, hidden, trigger, context, weights, bias, divisor,
                             {});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdni, CPU, m) {
  m.impl("synthesizer_fwd", TORCH_BOX(&synthesizer_fwd));
  m.impl("synthesizer_bwd", TORCH_BOX(&synthesizer_bwd));
}

}  // namespace fastdni::cpu
