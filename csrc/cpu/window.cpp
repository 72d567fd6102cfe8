// The window ops on the CPU.
#include "ops/window.h"

#include <cmath>
#include <cstring>

#include "cpu/kernels/sweep.h"
#include "cpu/product.h"
#include "cpu/recurrence.h"
#include "cpu/scratch.h"
#include "cpu/sweep_memory.h"
#include "cpu/synthesizer.h"
#include "cpu/update.h"
#include "ops/update.h"

namespace fastdni::cpu {
namespace {

// Calls body(tensor, layer, the column where the layer's features begin, features).
template <class Body>
void for_layers(const Tensors& state, int64_t predicted, const Body& body) {
  int64_t column = 0;
  for (int64_t i = 0; i < predicted; ++i) {
    const int64_t layers = state[i].dim() == 3 ? state[i].size(0) : 1;
    const int64_t features = state[i].size(-1);
    for (int64_t l = 0; l < layers; ++l, column += features) body(i, l, column, features);
  }
}

template <class T>
Tensor joined(const Tensors& state, int64_t predicted, const JoinedState& shape) {
  const Tensor out = empty(state[0], {shape.rows, shape.columns});
  for_layers(state, predicted, [&](int64_t i, int64_t l, int64_t column, int64_t features) {
    const T* from = data<T>(state[i]) + l * shape.rows * features;
    T* to = mutable_data<T>(out) + column;
    for (int64_t r = 0; r < shape.rows; ++r) {
      std::memcpy(to + r * shape.columns, from + r * features, features * sizeof(T));
    }
  });
  return out;
}

// factor times a message, as gradients of the state's tensors; rows that have ended get zeros.
template <class T>
Tensors split(const Tensor& message, const Tensors& state, int64_t predicted,
              const JoinedState& shape, double factor, const OptionalTensor& ended) {
  Tensors out;
  for (size_t i = 0; i < state.size(); ++i) {
    out.push_back(empty(state[i], shape_of(state[i])));
    if (static_cast<int64_t>(i) >= predicted) {
      std::memset(out[i].data_ptr(), 0, out[i].numel() * sizeof(T));
    }
  }
  const bool* masked = ended ? data<bool>(*ended) : nullptr;
  for_layers(state, predicted, [&](int64_t i, int64_t l, int64_t column, int64_t features) {
    T* to = mutable_data<T>(out[i]) + l * shape.rows * features;
    for (int64_t r = 0; r < shape.rows; ++r) {
      const T* from = data<T>(message) + r * shape.columns + column;
      const bool zero = masked != nullptr && masked[r];
      for (int64_t k = 0; k < features; ++k) {
        to[r * features + k] = zero ? T(0) : static_cast<T>(factor) * from[k];
      }
    }
  });
  return out;
}

struct Head {
  Tensor prediction, loss, grad_output;
  Tensors gradients;
};

// The gradient of the loss with respect to z, from z; returns the loss.
template <class T>
double differentiate(const HeadArguments& head, const Matrix<T>& z, const Tensor& target,
                     double weight, const Matrix<T>& grad) {
  int64_t count = head.rows * head.outputs;
  const bool labels = head.criterion == Criterion::cross_entropy;
  if (labels) {
    count = 0;
    for (int64_t r = 0; r < head.rows; ++r) count += data<int64_t>(target)[r] != kIgnoreIndex;
  }
  const T scale = static_cast<T>((labels ? 1 : 2) * weight / count);
  const int64_t blocks = pieces<T>(head.rows, head.outputs);
  std::vector<double> losses(blocks);
  with_isa([&](auto isa) {
    in_parallel(blocks, head.rows * head.outputs * 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Rows rows{head.rows * i / blocks, head.rows * (i + 1) / blocks};
        if (labels) {
          losses[i] = cross_entropy_rows<isa.value, T>(z, data<int64_t>(target), scale, grad, rows);
        } else {
          const Matrix<const T> wanted{data<T>(target), head.outputs, head.outputs};
          losses[i] = error_rows<isa.value, T>(z, wanted, scale, grad, rows);
        }
      }
    });
  });
  double sum = 0;
  for (double each : losses) sum += each;
  return weight * sum / count;
}

template <class T>
Head run_head(const HeadArguments& head, const Tensor& output, const OptionalTensor& target,
              double weight, const Tensor& head_weight, const OptionalTensor& bias) {
  const Tensor out = as_matrix(output);
  const Tensor z = product(out, head_weight), loss = empty(out, {});
  const Matrix<T> of_z{mutable_data<T>(z), head.outputs, head.outputs};
  if (bias) {
    with_isa([&](auto isa) {
      finish_rows<isa.value, T>(of_z, data<T>(*bias), nullptr, Activation::identity,
                                {0, head.rows});
    });
  }
  *mutable_data<T>(loss) = 0;
  if (!target) return {z, loss, empty(out, {0}), {}};
  // With what sum_columns may read behind the last element.
  const Tensor memory = empty(out, {head.rows * head.outputs + kOverread / int64_t{sizeof(T)}});
  const Tensor grad = view(memory, {head.rows, head.outputs}, {head.outputs, 1});
  const Matrix<T> of_grad{mutable_data<T>(grad), head.outputs, head.outputs};
  *mutable_data<T>(loss) = static_cast<T>(differentiate<T>(head, of_z, *target, weight, of_grad));
  Tensors gradients{weight_gradient(grad, out)};
  if (bias) {
    gradients.push_back(empty(*bias, {head.outputs}));
    with_isa([&](auto isa) {
      for (int64_t c = 0; c < head.outputs; c += kLargeBlockRows) {
        const int64_t end = std::min(c + kLargeBlockRows, head.outputs);
        sum_columns<isa.value, T>(of_grad, head.rows, c, end, mutable_data<T>(gradients[1]) + c);
      }
    });
  }
  const Tensor grad_output = product(grad, transposed(head_weight));
  const Shape wide = shape_of(output);
  return {z, loss, view(grad_output, wide, contiguous_strides(wide)), gradients};
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors> window_fwd(
    const std::string& caller, const Tensor& output, const OptionalTensor& target,
    const std::string& criterion, double weight, const Tensor& head_weight,
    const OptionalTensor& head_bias, const Tensors& state, int64_t predicted,
    const OptionalTensor& context, const Tensors& parameters, int64_t layers, bool bias,
    double factor, const OptionalTensor& ended) {
  const Tensor out = as_contiguous(output);
  OptionalTensor wanted;
  if (target) wanted = as_contiguous(*target);
  const HeadArguments head = check_head(caller, out, wanted, criterion, head_weight, head_bias);
  Tensors after;
  for (const Tensor& each : state) after.push_back(as_contiguous(each));
  const JoinedState shape = check_joined(caller, "state", after, predicted);
  check_rows(caller, "ended", ended, shape);
  Head made;
  Tensors sent;
  const auto run = [&](auto scalar) {
    using T = decltype(scalar);
    made = run_head<T>(head, out, wanted, weight, head_weight, head_bias);
    if (factor == 0) return;
    const Tensor trigger = joined<T>(after, predicted, shape);
    const WindowSynthesizer m =
        check_window_synthesizer(caller, shape, trigger, context, parameters, layers, bias);
    const auto [message, hidden] = evaluate_synthesizer(trigger, context, m.weights, m.biases,
                                                        m.context_weight, m.context_bias);
    sent = split<T>(message, after, predicted, shape, factor, ended);
  };
  out.scalar_type() == ScalarType::Float ? run(float{}) : run(double{});
  return {made.prediction, made.loss, made.grad_output, made.gradients, sent};
}

// What M learns: target_scale clip(row_unit G); and the sum of its squares, over the rows that
// count.
template <class T>
double make_target(const Tensor& target, double row_unit, double clip, double target_scale,
                   const bool* rows) {
  const int64_t columns = target.size(1);
  double energy = 0;
  for (int64_t r = 0; r < target.size(0); ++r) {
    T* row = mutable_data<T>(target) + r * columns;
    double squares = 0;
    for (int64_t k = 0; k < columns; ++k) squares += static_cast<double>(row[k]) * row[k];
    const double norm = std::sqrt(squares) * row_unit;
    double factor = row_unit * target_scale;
    if (clip > 0 && norm > clip) factor *= clip / norm;
    for (int64_t k = 0; k < columns; ++k) row[k] *= static_cast<T>(factor);
    if (rows == nullptr || rows[r]) energy += squares * factor * factor;
  }
  return energy;
}

std::tuple<Tensor, Tensor> window_update(
    const std::string& caller, const Tensors& start, const Tensors& grad_start, int64_t predicted,
    const OptionalTensor& context, const Tensors& parameters, int64_t layers, bool bias,
    bool learns, double row_unit, double clip, double target_scale, double scale,
    const OptionalTensor& rows, const Tensors& others, const Tensors& gradients,
    const Tensors& state, const Integers& groups, const std::vector<double>& settings) {
  Tensors before, found;
  for (const Tensor& each : start) before.push_back(as_contiguous(each));
  for (const Tensor& each : grad_start) found.push_back(as_contiguous(each));
  JoinedState shape;
  WindowSynthesizer m;
  OptionalTensor trigger;
  if (learns) {
    shape = check_joined(caller, "start", before, predicted);
    trigger = before[0].scalar_type() == ScalarType::Float
                  ? joined<float>(before, predicted, shape)
                  : joined<double>(before, predicted, shape);
    m = check_window_synthesizer(caller, shape, *trigger, context, parameters, layers, bias);
    const JoinedState of_gradients = check_joined(caller, "grad_start", found, predicted);
    FASTDNI_CHECK(of_gradients.rows == shape.rows && of_gradients.columns == shape.columns, caller,
                  ": grad_start must have the shapes of start");
    check_rows(caller, "rows", rows, shape);
  }
  Tensors grads = check_gradients(caller, others, gradients);
  Tensors updated = learns ? parameters : Tensors{};
  updated.insert(updated.end(), others.begin(), others.end());
  std::vector<ParameterMemory> memory;
  OptimizerBinding optimizer = bind_parameters(caller, placement_of(others[0], "parameters are"),
                                               updated, state, groups, settings, memory);
  Tensor loss = empty(others[0], {}), energy = empty(others[0], {});
  const auto run = [&](auto scalar) {
    using T = decltype(scalar);
    *mutable_data<T>(loss) = *mutable_data<T>(energy) = T(0);
    if (learns) {
      const bool* counting = rows ? data<bool>(*rows) : nullptr;
      const Tensor target = joined<T>(found, predicted, shape);
      const double squares = make_target<T>(target, row_unit, clip, target_scale, counting);
      *mutable_data<T>(energy) = static_cast<T>(squares * scale / 2);
      const auto [message, hidden] = evaluate_synthesizer(*trigger, context, m.weights, m.biases,
                                                          m.context_weight, m.context_bias);
      for (int64_t r = 0; counting != nullptr && r < shape.rows; ++r) {
        if (counting[r]) continue;  // what counts not has no error
        std::memcpy(mutable_data<T>(target) + r * shape.columns,
                    data<T>(message) + r * shape.columns, shape.columns * sizeof(T));
      }
      const auto [squared, own] = regress_synthesizer(target, message, hidden, *trigger, context,
                                                      m.weights, bias, 2 / scale, {});
      *mutable_data<T>(loss) = *data<T>(squared);
      grads.insert(grads.begin(), own.begin(), own.end());
    }
  };
  others[0].scalar_type() == ScalarType::Float ? run(float{}) : run(double{});
  update_parameters(optimizer, memory, grads);
  return {loss, energy};
}

std::tuple<Tensor, Tensor, Tensors, Tensor, Tensor> window_step(
    const std::string& caller, const std::string& cell, const Tensor& x, const Tensors& start,
    const Tensors& weights, bool cell_bias, const OptionalTensor& target,
    const std::string& criterion, double weight, const Tensor& head_weight,
    const OptionalTensor& head_bias, int64_t predicted, const OptionalTensor& start_context,
    const OptionalTensor& end_context, const Tensors& parameters, int64_t layers, bool bias,
    bool learns, double factor, double row_unit, double clip, double target_scale, double scale,
    const OptionalTensor& rows, const OptionalTensor& ended, const Tensors& state,
    const Integers& groups, const std::vector<double>& settings) {
  std::optional<Scratch<char>> memory;
  Saved saved{};
  const auto [output, after] =
      recurrence_fwd(cell, x, start, weights, cell_bias, [&](int64_t bytes) {
        memory.emplace(bytes);
        saved = {memory->data(), bytes};
        return saved.data;
      });
  auto [prediction, loss, grad_output, grad_head, sent] =
      window_fwd(caller, output, target, criterion, weight, head_weight, head_bias, after,
                 predicted, end_context, parameters, layers, bias, factor, ended);
  OptionalTensor above;
  if (target) above = grad_output;
  auto [grad_x, grad_start, gradients] =
      recurrence_bwd(cell, x, start, weights, cell_bias, output, saved, above, sent, false, true);
  Tensors others = weights;
  if (target) {
    gradients.insert(gradients.end(), grad_head.begin(), grad_head.end());
    others.push_back(head_weight);
    if (head_bias) others.push_back(*head_bias);
  }
  const auto [synthesis_loss, energy] = window_update(
      caller, start, grad_start, predicted, start_context, parameters, layers, bias, learns,
      row_unit, clip, target_scale, scale, rows, others, gradients, state, groups, settings);
  return {prediction, loss, after, synthesis_loss, energy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdni, CPU, m) {
  m.impl("window_step_", TORCH_BOX(&window_step));
  m.impl("window_fwd", TORCH_BOX(&window_fwd));
  m.impl("window_update_", TORCH_BOX(&window_update));
}

}  // namespace fastdni::cpu
