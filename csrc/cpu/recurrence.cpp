// The recurrence op on the CPU. Rows do not meet before the weights' gradients: a block of them
// goes through all layers and steps by itself.
#include "cpu/recurrence.h"

#include <cstring>
#include <deque>

#include "cpu/recurrence_memory.h"
#include "cpu/scratch.h"
#include "ops/recurrence.h"

namespace fastdni::cpu {
namespace {

template <Isa isa, class T>
class Window {
 public:
  explicit Window(const RecurrenceArguments& given)
      : given_(given), rows_(given.steps * given.batch), width_(given.gates() * given.hidden) {}

  // Numbers that the forward pass leaves for the backward pass.
  int64_t saved() const {
    Store<T> store(nullptr);
    lay(store, nullptr);
    return store.count();
  }

  void forward(const Tensor& x, const Tensors& state, const Tensor& output, const Tensors& after,
               T* saved) {
    std::vector<LayerMemory<T>> layers = laid(saved, output);
    const Scratch<T> packed = pack_forward();
    const std::vector<T> biases = add_biases();
    const int64_t batch = given_.batch, hidden = given_.hidden;
    in_blocks([&](int64_t begin, int64_t end) {
      const Rows rows{0, end - begin};
      for (int64_t l = 0; l < given_.layers; ++l) {
        const LayerMemory<T>& layer = layers[l];
        for (int64_t t = 0; t < given_.steps; ++t) {
          const int64_t row = t * batch + begin;
          const Strided<T> h = before(state[0], layer.h, l, t, begin);
          const Matrix<T> gates = from(layer.gates, row), recurrent = from(layer.recurrent, row);
          times(input(x, layers, l, row), packed.data() + at_input_[l], given_.layer_inputs(l),
                width_, rows.end, false, gates);
          const bool gru = given_.cell == Cell::gru;
          times(h, packed.data() + at_hidden_[l], hidden, width_, rows.end, !gru,
                gru ? recurrent : gates);
          CellStep<T> step{};
          step.gates = gates;
          step.recurrent = recurrent;
          step.bias = biases.data() + l * (width_ + hidden);
          step.bias_n = step.bias + width_;
          step.c = from(layer.c, row);
          step.tanh_c = from(layer.tanh_c, row);
          step.h = from(layer.h, row);
          step.before = before_of(state, layer, l, t, begin);
          cell_forward<isa, T>(given_.cell, step, hidden, rows);
        }
        const int64_t last = (given_.steps - 1) * batch + begin;
        copy(from(layer.h, last), rows.end, state_row(after[0], l, begin));
        if (given_.cell == Cell::lstm) {
          copy(from(layer.c, last), rows.end, state_row(after[1], l, begin));
        }
      }
    });
  }

  // Gradients of the weights in their order, of the state, and of x where it is wanted.
  void backward(const Tensor& x, const Tensors& state, const Tensor& output, T* saved,
                const OptionalTensor& grad_output, const Tensors& grad_after,
                const OptionalTensor& grad_x, const Tensors& grad_before,
                const Tensors& grad_weights) {
    const std::vector<LayerMemory<T>> layers = laid(saved, output);
    Store<T> size(nullptr);
    lay_gradients(size);
    const Scratch<T> scratch(size.count());
    Store<T> store(scratch.data());
    std::vector<Gradients> gradients = lay_gradients(store);
    const Scratch<T> packed = pack_backward();
    in_blocks([&](int64_t begin, int64_t end) {
      for (int64_t l = given_.layers; l-- > 0;) {
        layer_backward(l, begin, end, state, layers, gradients, packed, grad_output, grad_after,
                       grad_x, grad_before);
      }
    });
    if (!grad_weights.empty()) weights_backward(x, state, layers, gradients, grad_weights);
  }

 private:
  struct Gradients {
    Matrix<T> gates, recurrent;  // (T B, G H); of a GRU alone the second
    Matrix<T> h, c;              // (B, H), from the step after
    Matrix<T> input;             // (T B, K)
  };

  void layer_backward(int64_t l, int64_t begin, int64_t end, const Tensors& state,
                      const std::vector<LayerMemory<T>>& layers, std::vector<Gradients>& gradients,
                      const Scratch<T>& packed, const OptionalTensor& grad_output,
                      const Tensors& grad_after, const OptionalTensor& grad_x,
                      const Tensors& grad_before) {
    const int64_t batch = given_.batch, hidden = given_.hidden, inputs = given_.layer_inputs(l);
    const Rows rows{0, end - begin};
    const bool lstm = given_.cell == Cell::lstm, gru = given_.cell == Cell::gru;
    const bool top = l + 1 == given_.layers, plain = !lstm && !gru;
    const LayerMemory<T>& layer = layers[l];
    const Gradients& own = gradients[l];
    const Matrix<T> h = from(own.h, begin), c = from(own.c, begin);
    start(grad_after, 0, l, begin, rows.end, h);
    if (lstm) start(grad_after, 1, l, begin, rows.end, c);
    for (int64_t t = given_.steps; t-- > 0;) {
      const int64_t row = t * batch + begin;
      CellGradient<T> step{};
      step.gates = from(plain ? layer.h : layer.gates, row);
      step.recurrent = from(layer.recurrent, row);
      step.before = before_of(state, layer, l, t, begin);
      step.tanh_c = from(layer.tanh_c, row);
      if (!top) {
        step.grad_above = from(gradients[l + 1].input, row);
      } else if (grad_output.has_value()) {
        step.grad_above = Matrix<const T>{data<T>(*grad_output) + row * hidden, hidden, hidden};
      }
      step.grad_h = h;
      step.grad_c = c;
      step.grad_gates = from(own.gates, row);
      step.grad_recurrent = from(own.recurrent, row);
      cell_backward<isa, T>(given_.cell, step, hidden, rows);
      const Matrix<T> to_hidden = gru ? step.grad_recurrent : step.grad_gates;
      times(row_major<T>(to_hidden.data, to_hidden.stride), packed.data() + at_hidden_[l], width_,
            hidden, rows.end, gru, h);
      if (l == 0 && !grad_x.has_value()) continue;
      const Matrix<T> below = from(own.input, row);
      times(row_major<T>(step.grad_gates.data, step.grad_gates.stride),
            packed.data() + at_input_[l], width_, inputs, rows.end, false, below);
      if (l == 0) {
        copy(below, rows.end, Matrix<T>{mutable_data<T>(*grad_x) + row * inputs, inputs, inputs});
      }
    }
    copy(h, rows.end, state_row(grad_before[0], l, begin));
    if (lstm) copy(c, rows.end, state_row(grad_before[1], l, begin));
  }

  // [dz]^T [x | h of the step before | 1]
  void weights_backward(const Tensor& x, const Tensors& state,
                        const std::vector<LayerMemory<T>>& layers,
                        const std::vector<Gradients>& gradients, const Tensors& grad_weights) {
    std::vector<WeightJob<T>> jobs;
    std::deque<Scratch<T>> packed;
    const int64_t hidden = given_.hidden, per_layer = given_.bias ? 4 : 2;
    for (int64_t l = 0; l < given_.layers; ++l) {
      const int64_t inputs = given_.layer_inputs(l);
      const T* in = l == 0 ? data<T>(x) : layers[l - 1].h.data;
      const Matrix<T> of_hidden =
          given_.cell == Cell::gru ? gradients[l].recurrent : gradients[l].gates;
      const auto grad = [&](int64_t which) {
        return mutable_data<T>(grad_weights[l * per_layer + which]);
      };
      const bool narrow = inputs <= kFewColumns;
      if (!narrow) {
        packed.emplace_back(rows_ * padded<isa, T>(inputs));
        pack_rows<isa, T>(in, inputs, rows_, inputs, 0, panels<isa, T>(inputs), 0, rows_, false,
                          packed.back().data());
      }
      const bool apart = given_.cell == Cell::gru;  // whose biases have gradients of their own
      jobs.push_back({gradients[l].gates, narrow ? nullptr : packed.back().data(), in, inputs,
                      grad(0), given_.bias ? grad(2) : nullptr,
                      given_.bias && !apart ? grad(3) : nullptr});
      packed.emplace_back(rows_ * padded<isa, T>(hidden));
      const int64_t last = panels<isa, T>(hidden);
      pack_rows<isa, T>(data<T>(state[0]) + l * given_.batch * hidden, hidden, rows_, hidden, 0,
                        last, 0, given_.batch, false, packed.back().data());
      pack_rows<isa, T>(layers[l].h.data - given_.batch * hidden, hidden, rows_, hidden, 0, last,
                        given_.batch, rows_, false, packed.back().data());
      jobs.push_back({of_hidden, packed.back().data(), nullptr, hidden, grad(1),
                      given_.bias && apart ? grad(3) : nullptr, nullptr});
    }
    run_jobs<isa, T>(jobs, rows_, width_, pieces<T>(width_, rows_ * hidden), work());
  }

  // ---- memory ----

  std::vector<LayerMemory<T>> lay(Store<T>& store, T* output) const {
    std::vector<LayerMemory<T>> layers(given_.layers);
    const int64_t hidden = given_.hidden, stride = padded<isa, T>(width_);
    for (int64_t l = 0; l < given_.layers; ++l) {
      LayerMemory<T>& layer = layers[l];
      layer.gates = store.matrix(rows_, width_, stride);
      if (given_.cell == Cell::gru) layer.recurrent = store.matrix(rows_, width_, stride);
      if (given_.cell == Cell::lstm) {
        layer.c = store.matrix(rows_, hidden, hidden);
        layer.tanh_c = store.matrix(rows_, hidden, hidden);
      }
      const bool top = l + 1 == given_.layers;
      layer.h = top ? Matrix<T>{output, hidden, hidden} : store.matrix(rows_, hidden, hidden);
    }
    return layers;
  }

  std::vector<LayerMemory<T>> laid(T* saved, const Tensor& output) const {
    Store<T> store(saved);
    return lay(store, mutable_data<T>(output));
  }

  std::vector<Gradients> lay_gradients(Store<T>& store) const {
    std::vector<Gradients> gradients(given_.layers);
    const int64_t hidden = given_.hidden, stride = padded<isa, T>(width_);
    for (int64_t l = 0; l < given_.layers; ++l) {
      Gradients& own = gradients[l];
      own.gates = store.matrix(rows_, width_, stride);
      if (given_.cell == Cell::gru) own.recurrent = store.matrix(rows_, width_, stride);
      own.h = store.matrix(given_.batch, hidden, padded<isa, T>(hidden));
      if (given_.cell == Cell::lstm) own.c = store.matrix(given_.batch, hidden, hidden);
      const int64_t inputs = given_.layer_inputs(l);
      own.input = store.matrix(rows_, inputs, padded<isa, T>(inputs));
    }
    return gradients;
  }

  // ---- weights, in panels ----

  Scratch<T> pack_forward() {
    return packed([&](const T* w, int64_t inputs, T* out) {
      pack<isa, T>(Strided<T>{w, 1, inputs}, inputs, width_, 0, panels<isa, T>(width_), false, out);
      return padded<isa, T>(width_) * inputs;
    });
  }

  Scratch<T> pack_backward() {
    return packed([&](const T* w, int64_t inputs, T* out) {
      pack<isa, T>(row_major(w, inputs), width_, inputs, 0, panels<isa, T>(inputs), false, out);
      return padded<isa, T>(inputs) * width_;
    });
  }

  template <class Pack>
  Scratch<T> packed(const Pack& pack) {
    int64_t most = 0;
    for (int64_t l = 0; l < given_.layers; ++l) {
      const int64_t inputs = given_.layer_inputs(l), hidden = given_.hidden;
      most += padded<isa, T>(width_) * (padded<isa, T>(inputs) + padded<isa, T>(hidden));
    }
    Scratch<T> out(most);
    at_input_.clear();
    at_hidden_.clear();
    int64_t used = 0;
    for (int64_t l = 0; l < given_.layers; ++l) {
      at_input_.push_back(used);
      used += pack(data<T>(given_.weight(l, 0)), given_.layer_inputs(l), out.data() + used);
      at_hidden_.push_back(used);
      used += pack(data<T>(given_.weight(l, 1)), given_.hidden, out.data() + used);
    }
    return out;
  }

  // Of each layer what is added to the gates, (G H,), and then to a GRU's W_hn h, (H,).
  std::vector<T> add_biases() const {
    const int64_t hidden = given_.hidden, count = width_ + hidden;
    std::vector<T> sums(given_.layers * count);
    if (!given_.bias) return sums;
    const int64_t both = given_.cell == Cell::gru ? 2 * hidden : width_;
    for (int64_t l = 0; l < given_.layers; ++l) {
      const T* of_input = data<T>(given_.weight(l, 2));
      const T* of_hidden = data<T>(given_.weight(l, 3));
      T* sum = sums.data() + l * count;
      for (int64_t i = 0; i < width_; ++i) sum[i] = of_input[i] + (i < both ? of_hidden[i] : T(0));
      for (int64_t i = both; i < width_; ++i) sum[width_ + i - both] = of_hidden[i];
    }
    return sums;
  }

  // ---- places ----

  static Matrix<T> from(const Matrix<T>& matrix, int64_t row) {
    return {matrix.data == nullptr ? nullptr : matrix.row(row), matrix.columns, matrix.stride};
  }

  Matrix<T> state_row(const Tensor& state, int64_t l, int64_t row) const {
    const int64_t hidden = given_.hidden;
    return {mutable_data<T>(state) + (l * given_.batch + row) * hidden, hidden, hidden};
  }

  Strided<T> input(const Tensor& x, const std::vector<LayerMemory<T>>& layers, int64_t l,
                   int64_t row) const {
    const int64_t inputs = given_.layer_inputs(l);
    return row_major<T>((l == 0 ? data<T>(x) : layers[l - 1].h.data) + row * inputs, inputs);
  }

  // What a layer had the step before: of the window's state at first.
  Matrix<T> before_matrix(const Tensor& state, const Matrix<T>& own, int64_t l, int64_t t,
                          int64_t row) const {
    return t == 0 ? state_row(state, l, row) : from(own, (t - 1) * given_.batch + row);
  }
  Strided<T> before(const Tensor& state, const Matrix<T>& own, int64_t l, int64_t t,
                    int64_t row) const {
    const Matrix<T> found = before_matrix(state, own, l, t, row);
    return row_major<T>(found.data, found.stride);
  }
  Matrix<T> before_of(const Tensors& state, const LayerMemory<T>& layer, int64_t l, int64_t t,
                      int64_t row) const {
    if (given_.cell == Cell::lstm) return before_matrix(state[1], layer.c, l, t, row);
    return before_matrix(state[0], layer.h, l, t, row);
  }

  // ---- work ----

  int64_t work() const {
    int64_t inputs = 0;
    for (int64_t l = 0; l < given_.layers; ++l) inputs += given_.layer_inputs(l) + given_.hidden;
    return rows_ * width_ * inputs;
  }

  template <class Body>
  void in_blocks(const Body& body) const {
    const int64_t count = pieces<T>(given_.batch, width_ * given_.hidden);
    in_parallel(count, work(), [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        body(given_.batch * i / count, given_.batch * (i + 1) / count);
      }
    });
  }

  static void times(const Strided<T>& left, const T* packed, int64_t depth, int64_t columns,
                    int64_t rows, bool add, Matrix<T> out) {
    multiply<isa, T>(left, packed, rows, depth, 0, panels<isa, T>(columns), false, add, out.data,
                     out.stride);
  }

  static void copy(Matrix<const T> source, int64_t rows, Matrix<T> target) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(target.row(r), source.row(r), target.columns * sizeof(T));
    }
  }

  void start(const Tensors& grad_after, size_t which, int64_t l, int64_t begin, int64_t rows,
             Matrix<T> out) const {
    if (!grad_after.empty()) return copy(state_row(grad_after[which], l, begin), rows, out);
    for (int64_t r = 0; r < rows; ++r) std::memset(out.row(r), 0, out.columns * sizeof(T));
  }

  const RecurrenceArguments& given_;
  const int64_t rows_, width_;
  std::vector<int64_t> at_input_, at_hidden_;  // where each layer's weights are among the packed
};

Tensors contiguous(const Tensors& tensors) {
  Tensors result;
  for (const Tensor& tensor : tensors) result.push_back(as_contiguous(tensor));
  return result;
}

Tensors empty_like(const Tensors& tensors) {
  Tensors result;
  for (const Tensor& tensor : tensors) result.push_back(empty(tensor, shape_of(tensor)));
  return result;
}

std::tuple<Tensor, Tensors, Tensor> forward(const std::string& cell, const Tensor& x,
                                            const Tensors& state, const Tensors& weights,
                                            bool bias) {
  OptionalTensor saved;
  const int64_t width = x.scalar_type() == ScalarType::Float ? sizeof(float) : sizeof(double);
  const auto [output, after] = recurrence_fwd(cell, x, state, weights, bias, [&](int64_t bytes) {
    saved = empty(x, {bytes / width});
    return saved->data_ptr();
  });
  return {output, after, *saved};
}

std::tuple<Tensor, Tensors, Tensors> backward(const std::string& cell, const Tensor& x,
                                              const Tensors& state, const Tensors& weights,
                                              bool bias, const Tensor& output, const Tensor& saved,
                                              const OptionalTensor& grad_output,
                                              const Tensors& grad_state, bool input_gradient,
                                              bool weight_gradients) {
  FASTDNI_CHECK(
      output.is_contiguous() && saved.is_contiguous() && saved.scalar_type() == x.scalar_type(),
      "recurrence: output and saved must be what the forward pass returned");
  const int64_t width = x.scalar_type() == ScalarType::Float ? sizeof(float) : sizeof(double);
  return recurrence_bwd(cell, x, state, weights, bias, output,
                        {saved.data_ptr(), saved.numel() * width}, grad_output, grad_state,
                        input_gradient, weight_gradients);
}

}  // namespace

std::tuple<Tensor, Tensors> recurrence_fwd(const std::string& cell, const Tensor& x,
                                           const Tensors& state, const Tensors& weights, bool bias,
                                           const SavedMemory& memory) {
  const Tensor input = as_contiguous(x);
  const Tensors before = contiguous(state), own = contiguous(weights);
  const RecurrenceArguments given = check_recurrence(cell, input, before, own, bias);
  const Tensor output = empty(x, {given.steps, given.batch, given.hidden});
  const Tensors after = empty_like(before);
  with_isa([&](auto isa) {
    const auto run = [&](auto scalar) {
      using T = decltype(scalar);
      Window<isa.value, T> window(given);
      auto* saved = static_cast<T*>(memory(window.saved() * static_cast<int64_t>(sizeof(T))));
      window.forward(input, before, output, after, saved);
    };
    x.scalar_type() == ScalarType::Float ? run(float{}) : run(double{});
  });
  return {output, after};
}

std::tuple<Tensor, Tensors, Tensors> recurrence_bwd(
    const std::string& cell, const Tensor& x, const Tensors& state, const Tensors& weights,
    bool bias, const Tensor& output, const Saved& saved, const OptionalTensor& grad_output,
    const Tensors& grad_state, bool input_gradient, bool weight_gradients) {
  const Tensor input = as_contiguous(x);
  const Tensors before = contiguous(state), own = contiguous(weights);
  OptionalTensor above;
  if (grad_output.has_value()) above = as_contiguous(*grad_output);
  const Tensors after = contiguous(grad_state);
  const RecurrenceArguments given =
      check_recurrence_bwd(cell, input, before, own, bias, output, above, after);
  OptionalTensor grad_x;
  if (input_gradient) grad_x = empty(input, shape_of(input));
  const Tensors grad_before = empty_like(before);
  const Tensors grad_weights = weight_gradients ? empty_like(own) : Tensors{};
  with_isa([&](auto isa) {
    const auto run = [&](auto scalar) {
      using T = decltype(scalar);
      Window<isa.value, T> window(given);
      FASTDNI_CHECK(saved.bytes == window.saved() * static_cast<int64_t>(sizeof(T)),
                    "recurrence: saved must be what the forward pass of this window returned");
      window.backward(input, before, output, static_cast<T*>(saved.data), above, after, grad_x,
                      grad_before, grad_weights);
    };
    x.scalar_type() == ScalarType::Float ? run(float{}) : run(double{});
  });
  return {grad_x ? *grad_x : empty(x, {0}), grad_before, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(fastdni, CPU, m) {
  m.impl("recurrence_fwd", TORCH_BOX(&forward));
  m.impl("recurrence_bwd", TORCH_BOX(&backward));
}

}  // namespace fastdni::cpu
