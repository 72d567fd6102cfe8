// recurrence: T steps of recurrent layers. The equations are in fastdni/reference/recurrence.py.
//
//   recurrence_fwd   output (T, B, H), the state after the window, and what the backward pass needs
//   recurrence_bwd   from the gradients of output and state: those of x, of the state before the
//                    window, and of the weights (none of these where they are not wanted)
//
// `weights` holds of each layer W_ih (G H, K), W_hh (G H, H), and b_ih, b_hh (G H,) where there are
// biases, as torch's modules do.
#include "ops/recurrence.h"

#include "common/names.h"

namespace fastdni {
namespace {

constexpr const char* kRecurrence = "recurrence";

void check_kind(const char* name, const Tensor& tensor, const Tensor& x) {
  FASTDNI_CHECK(tensor.scalar_type() == x.scalar_type(), kRecurrence, ": ", name,
                " must have x's dtype ", to_string(x.scalar_type()), ", got ",
                to_string(tensor.scalar_type()));
  FASTDNI_CHECK(tensor.device() == x.device(), kRecurrence, ": ", name, " must be on x's device");
}

void check_shape(const char* name, const Tensor& tensor, const Tensor& x, const Shape& wanted) {
  check_kind(name, tensor, x);
  FASTDNI_CHECK(shape_of(tensor) == wanted, kRecurrence, ": ", name, " must be ", to_string(wanted),
                ", got ", to_string(shape_of(tensor)));
}

}  // namespace

RecurrenceArguments check_recurrence(const std::string& cell, const Tensor& x, const Tensors& state,
                                     const Tensors& weights, bool bias) {
  const Cell kind = named<Cell>(
      kRecurrence, "cell", cell,
      {{"lstm", Cell::lstm}, {"gru", Cell::gru}, {"tanh", Cell::tanh}, {"relu", Cell::relu}});
  FASTDNI_CHECK(x.dim() == 3 && x.numel() > 0, kRecurrence,
                ": x must be (T, B, K), of one step and one row at least, got ",
                to_string(shape_of(x)));
  FASTDNI_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                kRecurrence, ": x must be float32 or float64, got ", to_string(x.scalar_type()));
  const int64_t of_layer = bias ? 4 : 2;
  FASTDNI_CHECK(!weights.empty() && weights.size() % of_layer == 0, kRecurrence,
                ": weights must hold ", of_layer, " tensors a layer, got ", weights.size());
  FASTDNI_CHECK(
      weights[0].dim() == 2 && weights[0].size(0) > 0 && weights[0].size(0) % gates_of(kind) == 0,
      kRecurrence, ": weights must begin with W_ih (", gates_of(kind), " H, K), got ",
      to_string(shape_of(weights[0])));
  const int64_t layers = weights.size() / of_layer;
  const int64_t rows = weights[0].size(0), hidden = rows / gates_of(kind);
  const RecurrenceArguments given{kind,   x.size(0), x.size(1), x.size(2),
                                  hidden, layers,    bias,      weights};
  for (int64_t l = 0; l < layers; ++l) {
    check_shape("W_ih", given.weight(l, 0), x, {rows, given.layer_inputs(l)});
    check_shape("W_hh", given.weight(l, 1), x, {rows, hidden});
    for (int64_t b = 2; b < of_layer; ++b) check_shape("a bias", given.weight(l, b), x, {rows});
  }
  FASTDNI_CHECK(static_cast<int64_t>(state.size()) == states_of(kind), kRecurrence,
                ": state must hold ", states_of(kind), " tensors, got ", state.size());
  for (const Tensor& each : state) check_shape("state", each, x, {layers, given.batch, hidden});
  return given;
}

RecurrenceArguments check_recurrence_bwd(const std::string& cell, const Tensor& x,
                                         const Tensors& state, const Tensors& weights, bool bias,
                                         const Tensor& output, const OptionalTensor& grad_output,
                                         const Tensors& grad_state) {
  const RecurrenceArguments given = check_recurrence(cell, x, state, weights, bias);
  const Shape of_output{given.steps, given.batch, given.hidden};
  check_shape("output", output, x, of_output);
  if (grad_output.has_value()) check_shape("output's gradient", *grad_output, x, of_output);
  FASTDNI_CHECK(grad_state.empty() || grad_state.size() == state.size(), kRecurrence,
                ": grad_state must hold nothing or ", state.size(), " tensors, got ",
                grad_state.size());
  for (const Tensor& each : grad_state) {
    check_shape("the state's gradient", each, x, shape_of(state[0]));
  }
  return given;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastdni, m) {
  m.def(
      "recurrence_fwd(str cell, Tensor x, Tensor[] state, Tensor[] weights, bool bias) -> "
      "(Tensor output, Tensor[] state, Tensor saved)");
  m.def(
      "recurrence_bwd(str cell, Tensor x, Tensor[] state, Tensor[] weights, bool bias, "
      "Tensor output, Tensor saved, Tensor? grad_output, Tensor[] grad_state, "
      "bool input_gradient, bool weight_gradients=True) -> (Tensor grad_x, Tensor[] grad_state, "
      "Tensor[] grad_weights)");
}

}  // namespace fastdni
