// window: what stands around the recurrence in a decoupled window, a call before its backward pass
// and one after it. The equations are in fastdni/reference/window.py.
//
//   window_fwd       the head's output, its loss and gradients, and what M sends at the window's
//   end window_update_   the regression of M at its start, and every parameter's update
//   window_step_     both, and the recurrence op between them
#include "ops/window.h"

#include "common/names.h"
#include "ops/sweep_binding.h"
#include "ops/synthesizer.h"

namespace fastdni {

JoinedState check_joined(const std::string& caller, const char* name, const Tensors& state,
                         int64_t predicted) {
  FASTDNI_CHECK(predicted >= 1 && predicted <= static_cast<int64_t>(state.size()), caller,
                ": predicted must be from 1 to ", state.size(), ", got ", predicted);
  JoinedState joined;
  joined.rows = state[0].dim() >= 2 ? state[0].size(-2) : 0;
  for (size_t i = 0; i < state.size(); ++i) {
    const Tensor& each = state[i];
    FASTDNI_CHECK(
        (each.dim() == 2 || each.dim() == 3) && each.size(-2) == joined.rows && each.numel() > 0,
        caller, ": ", name, " must hold tensors ([L,] B, H) of ", joined.rows, " rows, got ",
        to_string(shape_of(each)));
    FASTDNI_CHECK(
        each.scalar_type() == state[0].scalar_type() && each.device() == state[0].device() &&
            (each.scalar_type() == ScalarType::Float || each.scalar_type() == ScalarType::Double),
        caller, ": ", name, " must be float32 or float64, all of one dtype and device");
    if (static_cast<int64_t>(i) < predicted) joined.columns += each.numel() / joined.rows;
  }
  return joined;
}

WindowSynthesizer check_window_synthesizer(const std::string& caller, const JoinedState& joined,
                                           const Tensor& trigger, const OptionalTensor& context,
                                           const Tensors& parameters, int64_t layers, bool bias) {
  FASTDNI_CHECK(layers >= 1, caller, ": layers must be 1 or more, got ", layers);
  const int64_t count = (bias ? 2 : 1) * (layers + context.has_value());
  FASTDNI_CHECK(static_cast<int64_t>(parameters.size()) == count, caller, ": parameters must hold ",
                count, " tensors, got ", parameters.size());
  WindowSynthesizer given;
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
  FASTDNI_CHECK(given.weights.back().size(0) == joined.columns, caller,
                ": synthesizer must predict a gradient of the state, (..., ", joined.columns,
                "), got ", given.weights.back().size(0));
  return given;
}

HeadArguments check_head(const std::string& caller, const Tensor& output,
                         const OptionalTensor& target, const std::string& criterion,
                         const Tensor& weight, const OptionalTensor& bias) {
  FASTDNI_CHECK(output.dim() >= 2 && output.numel() > 0, caller,
                ": output must be (..., H), of one row at least, got ",
                to_string(shape_of(output)));
  HeadArguments given{criterion_named(caller, criterion), rows_of(output), output.size(-1), 0};
  FASTDNI_CHECK(given.criterion != Criterion::none, caller, ": criterion must be one");
  FASTDNI_CHECK(weight.dim() == 2 && weight.size(1) == given.inputs, caller, ": head must take ",
                given.inputs, " features, got a weight ", to_string(shape_of(weight)));
  given.outputs = weight.size(0);
  const auto check_kind = [&](const char* name, const Tensor& tensor) {
    FASTDNI_CHECK(
        tensor.scalar_type() == output.scalar_type() && tensor.device() == output.device(), caller,
        ": ", name, " must have the output's dtype and device, got ",
        to_string(tensor.scalar_type()));
  };
  check_kind("head", weight);
  if (bias.has_value()) {
    check_kind("head", *bias);
    FASTDNI_CHECK(shape_of(*bias) == Shape{given.outputs}, caller, ": head's bias must be (",
                  given.outputs, ",), got ", to_string(shape_of(*bias)));
  }
  if (!target.has_value()) return given;
  check_target(caller, *target, given.rows, given.outputs, criterion);
  if (given.criterion == Criterion::mse) check_kind("target", *target);
  return given;
}

void check_rows(const std::string& caller, const char* name, const OptionalTensor& given,
                const JoinedState& joined) {
  if (!given.has_value()) return;
  FASTDNI_CHECK(given->scalar_type() == ScalarType::Bool && given->is_contiguous() &&
                    given->numel() == joined.rows,
                caller, ": ", name, " must be ", joined.rows, " booleans, got ",
                to_string(given->scalar_type()), " ", to_string(shape_of(*given)));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastdni, m) {
  m.def(
      "window_fwd(str caller, Tensor output, Tensor? target, str criterion, float weight, "
      "Tensor head_weight, Tensor? head_bias, Tensor[] state, int predicted, Tensor? context, "
      "Tensor[] parameters, "
      "int layers, bool bias, float factor, Tensor? ended) -> (Tensor prediction, Tensor loss, "
      "Tensor grad_output, Tensor[] grad_head, Tensor[] grad_state)");
  m.def(
      "window_update_(str caller, Tensor[] start, Tensor[] grad_start, int predicted, "
      "Tensor? context, Tensor(a!)[] parameters, int layers, bool bias, bool learns, "
      "float row_unit, float clip, float target_scale, float scale, Tensor? rows, "
      "Tensor(b!)[] others, Tensor[] gradients, Tensor(c!)[] state, int[] groups, "
      "float[] settings) -> (Tensor loss, Tensor energy)");
  m.def(
      "window_step_(str caller, str cell, Tensor x, Tensor[] start, Tensor(b!)[] weights, "
      "bool cell_bias, Tensor? target, str criterion, float weight, Tensor(d!) head_weight, "
      "Tensor(e!)? head_bias, "
      "int predicted, Tensor? start_context, Tensor? end_context, Tensor(a!)[] parameters, "
      "int layers, bool bias, bool learns, float factor, float row_unit, float clip, "
      "float target_scale, float scale, Tensor? rows, Tensor? ended, Tensor(c!)[] state, int[] "
      "groups, float[] settings) -> (Tensor prediction, Tensor loss, "
      "Tensor[] after, Tensor synthesis_loss, Tensor energy)");
}

}  // namespace fastdni
