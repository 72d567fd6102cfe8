// F, S and D of a CPU sweep: what is done to a block of rows, what joins the blocks' sums, and the
// losses. In the order of a step.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/kernels/multiply.h"
#include "cpu/kernels/sweep.h"
#include "cpu/sweep_stages.h"

namespace fastdni::cpu {

template <Isa isa, class T>
class Passes {
 public:
  explicit Passes(CpuNetwork<T>& network) : net_(network) {}

  void pack_rows(const Activations<T>& input, Rows rows) {
    const int64_t columns = input.rows.columns;
    cpu::pack_rows<isa, T>(input.rows.data, input.rows.stride, net_.batch, columns, 0,
                           cpu::panels<isa, T>(columns), rows.begin, rows.end, net_.bfloat16,
                           input.panels);
  }

  void linear(Stage<T>& stage, Rows rows, int64_t b) {
    multiply_rows(stage.x->rows, stage.weight.forward, rows, false, stage.z);
    if (stage.spec.batch_norm) {
      const int64_t at = b * stage.spec.outputs;
      cpu::column_moments<isa, T>(stage.z, net_.value(stage.numbers.bias), rows,
                                  stage.block_sums + at, stage.block_dots + at);
    } else {
      cpu::finish_rows<isa, T>(stage.z, net_.value(stage.numbers.bias), nullptr,
                               stage.spec.activation, rows);
      finish(stage, rows);
    }
  }

  // Joins the blocks' moments (Chan et al. 1979) in double.
  void statistics(Stage<T>& stage) {
    const int64_t outputs = stage.spec.outputs;
    T* running_mean = nullptr;
    T* running_variance = nullptr;
    double momentum = stage.spec.momentum;
    if (stage.numbers.running != kNone) {
      running_mean = static_cast<T*>(net_.memory->statistics[stage.numbers.running]);
      running_variance = static_cast<T*>(net_.memory->statistics[stage.numbers.running + 1]);
      auto* tracked = static_cast<int64_t*>(net_.memory->statistics[stage.numbers.running + 2]);
      ++*tracked;
      if (momentum < 0) momentum = 1.0 / *tracked;
    }
    for (int64_t c = 0; c < outputs; ++c) {
      double mean = 0, squares = 0;
      for (int64_t b = 0; b < net_.blocks; ++b) {
        const Rows rows = net_.block(b);
        mean += static_cast<double>(stage.block_sums[b * outputs + c]) * (rows.end - rows.begin);
      }
      mean /= net_.batch;
      for (int64_t b = 0; b < net_.blocks; ++b) {
        const Rows rows = net_.block(b);
        const double off = stage.block_sums[b * outputs + c] - mean;
        squares += stage.block_dots[b * outputs + c] + off * off * (rows.end - rows.begin);
      }
      stage.mean[c] = static_cast<T>(mean);
      stage.inverse[c] = static_cast<T>(1 / std::sqrt(squares / net_.batch + stage.spec.eps));
      if (running_mean != nullptr) {
        running_mean[c] = static_cast<T>((1 - momentum) * running_mean[c] + momentum * mean);
        running_variance[c] = static_cast<T>((1 - momentum) * running_variance[c] +
                                             momentum * (squares / (net_.batch - 1)));
      }
    }
  }

  void normalize(Stage<T>& stage, Rows rows) {
    cpu::normalize_rows<isa, T>(stage.z, norm(stage), stage.spec.activation, stage.phi, rows);
    finish(stage, rows);
  }

  void evaluate(Evaluation<T>& evaluation, Rows rows) {
    const Synthesizer<T>& synthesizer = *evaluation.synthesizer;
    const Activations<T>* from = evaluation.trigger;
    for (size_t i = 0; i < synthesizer.weights.size(); ++i) {
      const bool last = i + 1 == synthesizer.weights.size();
      const Activations<T>& to = last ? *evaluation.prediction : *evaluation.hidden[i];
      multiply_rows(from->rows, synthesizer.weights[i].forward, rows, false, to.rows);
      if (i == 0 && synthesizer.context != nullptr) {
        multiply_rows(synthesizer.context->rows, synthesizer.context_weight.forward, rows, true,
                      to.rows);
      }
      cpu::finish_rows<isa, T>(to.rows, net_.value(synthesizer.biases[i]),
                               i == 0 ? net_.value(synthesizer.context_bias) : nullptr,
                               last ? Activation::identity : Activation::relu, rows);
      if (to.panels != nullptr) pack_rows(to, rows);
      from = &to;
    }
  }

  // The gradient of h, synthetic or the criterion's, and of u.
  void gradient(Stage<T>& stage, size_t s, Rows rows, int64_t b) {
    const Matrix<const T> h = stage.h->rows;
    if (stage.next_input != nullptr && net_.active(s + 1)) {
      Matrix<T>& target = stage.next_input->grads.back();
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        std::memcpy(target.row(r), h.row(r), h.columns * sizeof(T));
      }
      regress(*stage.next_input, rows, b);
    }
    if (stage.sent == nullptr) criterion(stage, rows, b);
    if (!net_.active(s)) return;
    Matrix<const T> grad =
        stage.sent == nullptr ? Matrix<const T>(stage.dz) : stage.sent->prediction->rows;
    if (stage.noise != kNone) {
      cpu::drop_rows<isa, T>(grad, noise(stage), stage.dz, rows);
      grad = stage.dz;
    }
    cpu::activation_gradient_rows<isa, T>(grad, stage.phi, stage.spec.activation, stage.dz, rows);
    if (stage.spec.batch_norm) {
      const int64_t at = b * stage.spec.outputs;
      cpu::column_dots<isa, T>(stage.dz, stage.z, rows, stage.block_sums + at,
                               stage.block_dots + at);
    }
  }

  void gradient_statistics(Stage<T>& stage) {
    const int64_t outputs = stage.spec.outputs;
    for (int64_t c = 0; c < outputs; ++c) {
      double sum = 0, dot = 0;
      for (int64_t b = 0; b < net_.blocks; ++b) {
        sum += stage.block_sums[b * outputs + c];
        dot += stage.block_dots[b * outputs + c];
      }
      stage.sums[c] = static_cast<T>(sum);
      stage.dots[c] = static_cast<T>(dot);
    }
  }

  void normalize_gradient(size_t s, Rows rows) {
    if (!net_.active(s)) return;
    Stage<T>& stage = net_.stages[s];
    cpu::normalize_gradient_rows<isa, T>(stage.dz, stage.z, norm(stage), stage.sums, stage.dots,
                                         static_cast<T>(net_.batch), rows);
  }

  // D: delta = dz W, the target of the synthesizer below.
  void propagate(size_t s, Rows rows, int64_t b) {
    if (!net_.active(s)) return;
    const Stage<T>& stage = net_.stages[s];
    if (s > 0) {
      Evaluation<T>& below = *net_.regressions[s - 1];
      multiply_rows(stage.dz, stage.weight.backward, rows, false, below.grads.back());
      regress(below, rows, b);
    } else if (net_.spec.input_gradient) {
      multiply_rows(stage.dz, stage.weight.backward, rows, false, net_.input_gradient);
      auto* out = static_cast<T*>(net_.memory->input_gradient);
      const int64_t columns = net_.input_gradient.columns;
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        std::memcpy(out + r * columns, net_.input_gradient.row(r), columns * sizeof(T));
      }
    }
  }

  // The topmost synthesizer's, from the gradient that came back from above.
  void regress_top(Rows rows, int64_t b) {
    Evaluation<T>& top = *net_.regressions.back();
    copy_rows(static_cast<const T*>(net_.memory->gradient), top.grads.back(), rows);
    regress(top, rows, b);
  }

  void report() {
    if (net_.spec.criterion == Criterion::none) return;
    double sum = 0;
    for (double part : net_.criterion_sums) sum += part;
    const double count = net_.spec.criterion == Criterion::cross_entropy
                             ? static_cast<double>(net_.counted)
                             : static_cast<double>(net_.batch) * net_.stages.back().spec.outputs;
    *static_cast<T*>(net_.memory->loss) = static_cast<T>(sum / count);
  }

  void report_synthesis() {
    auto* out = static_cast<T*>(net_.memory->synthesis_loss);
    for (const Evaluation<T>* evaluation : net_.regressions)
      *out++ = static_cast<T>(loss_of(*evaluation));
    for (const Stage<T>& stage : net_.stages) {
      if (stage.next_input != nullptr) *out++ = static_cast<T>(loss_of(*stage.next_input));
    }
  }

 private:
  void multiply_rows(const Matrix<T>& a, const T* panels, Rows rows, bool add, const Matrix<T>& c) {
    cpu::multiply<isa, T>(cpu::row_major<T>(a.row(rows.begin), a.stride), panels,
                          rows.end - rows.begin, a.columns, 0, cpu::panels<isa, T>(c.columns),
                          net_.bfloat16, add, c.row(rows.begin), c.stride);
  }

  static void copy_rows(const T* from, const Matrix<T>& to, Rows rows) {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      std::memcpy(to.row(r), from + r * to.columns, to.columns * sizeof(T));
    }
  }

  cpu::BatchNorm<T> norm(const Stage<T>& stage) const {
    return {stage.mean, stage.inverse, net_.value(stage.numbers.norm_weight),
            net_.value(stage.numbers.norm_bias)};
  }

  // From phi(u) to h, and to the output.
  void finish(const Stage<T>& stage, Rows rows) {
    if (stage.noise != kNone) {
      cpu::drop_rows<isa, T>(stage.phi, noise(stage), stage.h->rows, rows);
    }
    if (&stage == &net_.stages.back()) write_output(stage, rows);
  }

  Matrix<const T> noise(const Stage<T>& stage) const {
    const int64_t outputs = stage.spec.outputs;
    return {static_cast<const T*>(net_.memory->noise[stage.noise]), outputs, outputs};
  }

  void write_output(const Stage<T>& stage, Rows rows) {
    auto* output = static_cast<T*>(net_.memory->output);
    const Matrix<T>& h =
        stage.next_input == nullptr ? stage.h->rows : stage.next_input->prediction->rows;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      std::memcpy(output + r * h.columns, h.row(r), h.columns * sizeof(T));
    }
  }

  // From the target in the last of `grads` to the gradients of every layer.
  void regress(Evaluation<T>& evaluation, Rows rows, int64_t b) {
    const Synthesizer<T>& synthesizer = *evaluation.synthesizer;
    if (!net_.active(synthesizer.stage)) return;
    auto& grads = evaluation.grads;
    evaluation.squares[b] =
        cpu::error_rows<isa, T>(evaluation.prediction->rows, grads.back(),
                                static_cast<T>(2.0 / net_.batch), grads.back(), rows);
    for (size_t i = grads.size() - 1; i > 0; --i) {
      multiply_rows(grads[i], synthesizer.weights[i].backward, rows, false, grads[i - 1]);
      cpu::activation_gradient_rows<isa, T>(grads[i - 1], evaluation.hidden[i - 1]->rows,
                                            Activation::relu, grads[i - 1], rows);
    }
  }

  void criterion(const Stage<T>& stage, Rows rows, int64_t b) {
    if (net_.spec.criterion == Criterion::cross_entropy) {
      net_.criterion_sums[b] = cpu::cross_entropy_rows<isa, T>(
          stage.h->rows, static_cast<const int64_t*>(net_.memory->target),
          static_cast<T>(1.0 / std::max(net_.counted, int64_t{1})), stage.dz, rows);
    } else {
      const double count = static_cast<double>(net_.batch) * stage.spec.outputs;
      const Matrix<const T> target{static_cast<const T*>(net_.memory->target), stage.spec.outputs,
                                   stage.spec.outputs};
      net_.criterion_sums[b] =
          cpu::error_rows<isa, T>(stage.h->rows, target, static_cast<T>(2 / count), stage.dz, rows);
    }
  }

  double loss_of(const Evaluation<T>& evaluation) const {
    if (!net_.active(evaluation.synthesizer->stage)) {
      return std::numeric_limits<double>::quiet_NaN();
    }
    double sum = 0;
    for (double part : evaluation.squares) sum += part;
    return sum / net_.batch;
  }

  CpuNetwork<T>& net_;
};

}  // namespace fastdni::cpu
