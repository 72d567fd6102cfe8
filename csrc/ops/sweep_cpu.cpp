// The sweep on the CPU: one program of passes over blocks of rows (F, S and D of every stage), and
// one list of tasks (every weight gradient with its optimizer). Nothing here depends on the number
// of threads: blocks and tasks follow from the shapes, and sums over the batch from the blocks in
// order.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>

#include "cpu/multiply.h"
#include "cpu/sweep.h"
#include "ops/sweep_plan.h"

namespace fastdni {
namespace {

using cpu::Isa;
using cpu::Matrix;
using cpu::Rows;

// Rows of a block. Few, so that there is something for every thread and a block's activations stay
// near; but every block reads all weights, so more where these are too large for a core's own
// cache.
constexpr int64_t kBlockRows = 24, kLargeBlockRows = 64;
constexpr int64_t kLargeBytes = 512 << 10;
static_assert(kLargeBlockRows <= cpu::kMultiplyRows);
// Multiply-adds worth waking a thread for: about 20 us.
constexpr int64_t kWorkPerThread = int64_t{1} << 20;
// Columns of a weight gradient that are worked out before its optimizer takes them.
constexpr int64_t kUpdateColumns = 512;

template <Isa isa, class T>
class CpuSweep final : public Sweep {
 public:
  explicit CpuSweep(const NetworkSpec& spec)
      : spec_(spec), batch_(spec.batch), blocks_(pieces(spec.batch, largest_weight(spec))) {
    build();
    values_.resize(next_parameter_);
    rules_.resize(next_parameter_);
  }

  // How many pieces `rows` rows are cut into that each read `elements` elements.
  static int64_t pieces(int64_t rows, int64_t elements) {
    const bool large = elements * static_cast<int64_t>(sizeof(T)) >= kLargeBytes;
    const int64_t most = large ? kLargeBlockRows : kBlockRows;
    return (rows + most - 1) / most;
  }

  static int64_t largest_weight(const NetworkSpec& spec) {
    int64_t largest = 0;
    for (const StageSpec& stage : spec.stages) {
      largest = std::max(largest, stage.inputs * stage.outputs);
    }
    return largest;
  }

  int64_t workspace_bytes() const override { return bytes_; }

  void forward(const StepMemory& memory) override {
    memory_ = &memory;
    bind_values(memory);
    bind_inputs(memory);
    in_parallel(packings_.size(), pack_work_, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) run(packings_[i]);
    });
    run(forward_program_);
    report();
  }

  void update(const StepMemory& memory) override {
    memory_ = &memory;
    bind_values(memory);
    for (size_t i = 0; i < rules_.size(); ++i) rules_[i] = prepared(memory.parameters[i]);
    if (memory.gradient != nullptr) run(regression_program_);
    report_synthesis();
    in_parallel(tasks_.size(), update_work_, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) run(tasks_[i]);
    });
  }

 private:
  // ---- what the network is made of ----

  // The rows of some activations and, for products over the batch, their panels.
  struct Activations {
    Matrix<T> rows;
    T* panels = nullptr;
  };

  // A weight (outputs, inputs) in panels: of its transpose for x W^T, of itself for dz W.
  struct Weight {
    size_t parameter = 0;
    int64_t outputs = 0, inputs = 0;
    T* forward = nullptr;
    T* backward = nullptr;
  };

  static constexpr size_t kNone = std::numeric_limits<size_t>::max();

  struct Synthesizer {
    std::vector<Weight> weights;
    std::vector<size_t> biases;
    Weight context_weight;
    size_t context_bias = kNone;
    Activations* context = nullptr;
    size_t stage = 0;  // the one above its boundary, whose mask it shares
  };

  // A synthesizer at one trigger. `grads` are those of its layers' outputs; the last holds the
  // target first, then (2 / B) e.
  struct Evaluation {
    Synthesizer* synthesizer = nullptr;
    Activations* trigger = nullptr;
    std::vector<Activations*> hidden;
    Activations* prediction = nullptr;
    std::vector<Matrix<T>> grads;
    std::vector<double> squares;  // by block
  };

  struct Stage {
    StageSpec spec;
    Weight weight;
    size_t bias = kNone, norm_weight = kNone, norm_bias = kNone, statistics = kNone;
    Activations* x = nullptr;
    Activations* h = nullptr;
    Matrix<T> z;   // with BatchNorm, normalised; without, the same as h
    Matrix<T> dz;  // the gradient of h, of u and of z, one after the other
    T* mean = nullptr;
    T* inverse = nullptr;
    T* block_sums = nullptr;      // (blocks, outputs): means, then sums of du
    T* block_products = nullptr;  // (blocks, outputs): squares, then sums of du * z
    T* sums = nullptr;            // (outputs,): BatchNorm's bias gradient
    T* products = nullptr;        // (outputs,): BatchNorm's weight gradient
    Evaluation* sent = nullptr;   // M at h
    Evaluation* made = nullptr;   // I at x (complete unlock), whose prediction the next stage gets
  };

  // ---- programs: passes over blocks of rows, and what has to wait for all of them ----

  struct Pass {
    std::function<void(Rows, int64_t)> over_rows;
    std::function<void()> over_all;  // instead
  };
  using Program = std::vector<Pass>;

  Rows block(int64_t b) const { return {batch_ * b / blocks_, batch_ * (b + 1) / blocks_}; }

  void run(const Program& program) {
    for (size_t begin = 0; begin < program.size();) {
      if (program[begin].over_all) {
        program[begin++].over_all();
        continue;
      }
      size_t end = begin;
      while (end < program.size() && program[end].over_rows) ++end;
      in_parallel(blocks_, row_work_ * (end - begin) / program.size() + 1,
                  [&](int64_t first, int64_t last) {
                    for (int64_t b = first; b < last; ++b) {
                      for (size_t i = begin; i < end; ++i) program[i].over_rows(block(b), b);
                    }
                  });
      begin = end;
    }
  }

  // `work`: multiply-adds of all `count` pieces together.
  template <class Body>
  static void in_parallel(int64_t count, int64_t work, const Body& body) {
    if (count == 0) return;
    const int64_t threads = std::max(work / kWorkPerThread, int64_t{1});
    if (threads == 1 || count == 1) {
      body(0, count);
    } else {
      torch::stable::parallel_for(0, count, (count + threads - 1) / threads, body);
    }
  }

  // ---- memory ----

  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };

  T* allocate(int64_t count) {
    constexpr size_t kLine = 64;
    const size_t bytes = (count * sizeof(T) + kLine - 1) / kLine * kLine + cpu::kOverread;
    bytes_ += bytes;
    memory_blocks_.emplace_back(static_cast<T*>(std::aligned_alloc(kLine, std::max(bytes, kLine))));
    FASTDNI_CHECK(memory_blocks_.back() != nullptr, "sweep: out of memory for ", bytes, " bytes");
    return memory_blocks_.back().get();
  }

  static int64_t padded(int64_t columns) { return cpu::padded<isa, T>(columns); }

  Matrix<T> matrix(int64_t columns) {
    return {allocate(batch_ * padded(columns)), columns, padded(columns)};
  }

  // Activations with memory of their own, or (stride 0) none yet.
  Activations* activations(int64_t columns, bool own, bool panels) {
    activations_.push_back({own ? matrix(columns) : Matrix<T>{nullptr, columns, columns}, nullptr});
    if (panels) activations_.back().panels = allocate(batch_ * padded(columns));
    return &activations_.back();
  }

  // ---- building ----

  size_t take_parameter() { return next_parameter_++; }

  void pack_later(const Weight& weight, bool backward) {
    const int64_t columns = backward ? weight.inputs : weight.outputs;
    for (int64_t p = 0; p < cpu::panels<isa, T>(columns); ++p) {
      packings_.push_back({weight, backward, p});
    }
    // A panel's element costs about as much as eight multiply-adds.
    pack_work_ += 8 * weight.outputs * weight.inputs;
    row_work_ += batch_ * weight.outputs * weight.inputs;
  }

  Weight take_weight(int64_t outputs, int64_t inputs, bool backward) {
    Weight weight{take_parameter(), outputs, inputs, allocate(inputs * padded(outputs)), nullptr};
    pack_later(weight, false);
    if (backward) {
      weight.backward = allocate(outputs * padded(inputs));
      pack_later(weight, true);
    }
    return weight;
  }

  Synthesizer* take_synthesizer(const SynthesizerSpec& spec, size_t stage) {
    synthesizers_.emplace_back();
    Synthesizer& synthesizer = synthesizers_.back();
    synthesizer.stage = stage;
    const size_t layers = spec.widths.size() - 1;
    for (size_t i = 0; i < layers; ++i) {
      synthesizer.weights.push_back(take_weight(spec.widths[i + 1], spec.widths[i], i > 0));
    }
    for (size_t i = 0; i < layers; ++i) {
      synthesizer.biases.push_back(spec.bias ? take_parameter() : kNone);
    }
    if (spec.context > 0) {
      synthesizer.context_weight = take_weight(spec.widths[1], spec.context, false);
      if (spec.bias) synthesizer.context_bias = take_parameter();
      Activations*& context = contexts_[spec.context];
      if (context == nullptr) {
        context = activations(spec.context, true, true);
        own_contexts_[spec.context] = context->rows;
      }
      synthesizer.context = context;
    }
    return &synthesizer;
  }

  // `regressed`: whether this is the evaluation that the synthesizer is trained at.
  Evaluation* evaluate_later(Synthesizer* synthesizer, Activations* trigger, bool regressed,
                             bool prediction_panels, Program& program) {
    evaluations_.emplace_back();
    Evaluation& evaluation = evaluations_.back();
    evaluation.synthesizer = synthesizer;
    evaluation.trigger = trigger;
    for (const Weight& weight : synthesizer->weights) {
      const bool last = &weight == &synthesizer->weights.back();
      Activations* out = activations(weight.outputs, true, last ? prediction_panels : regressed);
      if (last) {
        evaluation.prediction = out;
      } else {
        evaluation.hidden.push_back(out);
      }
      if (regressed) evaluation.grads.push_back(matrix(weight.outputs));
    }
    evaluation.squares.assign(blocks_, 0);
    program.push_back(
        {[this, &evaluation](Rows rows, int64_t) { evaluate(evaluation, rows); }, {}});
    if (regressed) {
      add_job(evaluation.grads[0], trigger, synthesizer->weights[0].parameter,
              synthesizer->biases[0], synthesizer->context_bias, synthesizer->stage);
      if (synthesizer->context != nullptr) {
        add_job(evaluation.grads[0], synthesizer->context, synthesizer->context_weight.parameter,
                kNone, kNone, synthesizer->stage);
      }
      for (size_t i = 1; i < synthesizer->weights.size(); ++i) {
        add_job(evaluation.grads[i], evaluation.hidden[i - 1], synthesizer->weights[i].parameter,
                synthesizer->biases[i], kNone, synthesizer->stage);
      }
    }
    return &evaluation;
  }

  void pack_later(Activations* input, Program& program) {
    program.push_back({[this, input](Rows rows, int64_t) { pack_rows(*input, rows); }, {}});
  }

  void build() {
    const bool unlocked = spec_.unlocked();
    Program& program = forward_program_;
    // Parameters are taken in the order of `signature`.
    std::vector<Synthesizer*> gradient_synthesizers, input_synthesizers;
    for (size_t s = 0; s < spec_.stages.size(); ++s) {
      stages_.emplace_back();
      Stage& stage = stages_.back();
      stage.spec = spec_.stages[s];
      stage.weight =
          take_weight(stage.spec.outputs, stage.spec.inputs, s > 0 || spec_.input_gradient);
      if (stage.spec.bias) stage.bias = take_parameter();
      if (stage.spec.batch_norm && stage.spec.affine) {
        stage.norm_weight = take_parameter();
        stage.norm_bias = take_parameter();
      }
      if (stage.spec.batch_norm && stage.spec.running) {
        stage.statistics = next_statistic_;
        next_statistic_ += 3;
      }
      const SynthesizerSpec& m = stage.spec.synthesizer;
      const SynthesizerSpec& i = stage.spec.input_synthesizer;
      gradient_synthesizers.push_back(m.present() ? take_synthesizer(m, s + 1) : nullptr);
      input_synthesizers.push_back(i.present() ? take_synthesizer(i, s + 1) : nullptr);
    }

    x_ = activations(spec_.stages[0].inputs, false, true);
    pack_later(x_, program);
    network_input_ = x_;
    if (spec_.separate_input) {
      const int64_t width = spec_.stages[0].input_synthesizer.widths.front();
      network_input_ = activations(width, false, true);
      pack_later(network_input_, program);
    }
    for (const auto& [width, context] : contexts_) pack_later(context, program);

    for (size_t s = 0; s < stages_.size(); ++s) {
      Stage& stage = stages_[s];
      stage.x = s == 0 ? x_ : unlocked ? stages_[s - 1].made->prediction : stages_[s - 1].h;
      stage.h =
          activations(stage.spec.outputs, true, gradient_synthesizers[s] != nullptr && !unlocked);
      stage.z = stage.spec.batch_norm ? matrix(stage.spec.outputs) : stage.h->rows;
      stage.dz = matrix(stage.spec.outputs);
      if (unlocked && input_synthesizers[s] != nullptr) {
        stage.made = evaluate_later(input_synthesizers[s], network_input_, true, true, program);
      }
      add_job(stage.dz, stage.x, stage.weight.parameter, stage.bias, kNone, s);
      if (stage.spec.batch_norm) build_norm(stage, s);
    }

    // A stage whose dz waits for sums over the batch is finished after the next wait for all rows,
    // which the next stage's statistics need anyway.
    std::vector<size_t> waiting;
    const auto wait = [&] {
      program.push_back({{}, [this, waiting] {
                           for (size_t s : waiting) gradient_statistics(stages_[s]);
                         }});
      for (size_t s : waiting) {
        program.push_back({[this, s](Rows rows, int64_t b) {
                             normalize_gradient(s, rows);
                             propagate(s, rows, b);
                           },
                           {}});
      }
      waiting.clear();
    };

    for (size_t s = 0; s < stages_.size(); ++s) {
      Stage& stage = stages_[s];
      program.push_back({[this, &stage](Rows rows, int64_t b) { linear(stage, rows, b); }, {}});
      if (stage.spec.batch_norm) {
        program.push_back({{}, [this, &stage] { statistics(stage); }});
        if (!waiting.empty()) wait();
        program.push_back({[this, &stage](Rows rows, int64_t) { normalize(stage, rows); }, {}});
      }
      if (stage.h->panels != nullptr) pack_later(stage.h, program);
      if (gradient_synthesizers[s] != nullptr) {
        stage.sent = evaluate_later(gradient_synthesizers[s], stage.h, !unlocked, false, program);
        Evaluation* regressed = stage.sent;
        if (unlocked) {
          regressed = evaluate_later(gradient_synthesizers[s], stage.made->prediction, true, false,
                                     program);
        }
        regressions_.push_back(regressed);
      }
      program.push_back(
          {[this, &stage, s](Rows rows, int64_t b) { gradient(stage, s, rows, b); }, {}});
      if (stage.spec.batch_norm) {
        waiting.push_back(s);
      } else {
        program.push_back({[this, s](Rows rows, int64_t b) { propagate(s, rows, b); }, {}});
      }
    }
    if (!waiting.empty()) wait();

    if (spec_.input_gradient) input_gradient_ = matrix(spec_.stages[0].inputs);
    criterion_sums_.assign(blocks_, 0);
    if (gradient_synthesizers.back() != nullptr) {
      Evaluation* top = regressions_.back();
      regression_program_.push_back({[this, top](Rows rows, int64_t b) {
                                       copy_rows(static_cast<const T*>(memory_->gradient),
                                                 top->grads.back(), rows);
                                       regress(*top, rows, b);
                                     },
                                     {}});
    }
    for (size_t j = 0; j < jobs_.size(); ++j) {
      const int64_t outputs = jobs_[j].grad.columns;
      const Activations* input = jobs_[j].input;
      const int64_t count = pieces(outputs, input == nullptr ? 0 : batch_ * input->rows.columns);
      for (int64_t i = 0; i < count; ++i) {
        tasks_.push_back({j, outputs * i / count, outputs * (i + 1) / count});
      }
      update_work_ +=
          batch_ * outputs * (jobs_[j].input == nullptr ? 1 : jobs_[j].input->rows.columns);
    }
  }

  void build_norm(Stage& stage, size_t s) {
    const int64_t outputs = stage.spec.outputs;
    stage.mean = allocate(outputs);
    stage.inverse = allocate(outputs);
    stage.sums = allocate(outputs);
    stage.products = allocate(outputs);
    stage.block_sums = allocate(blocks_ * outputs);
    stage.block_products = allocate(blocks_ * outputs);
    if (stage.norm_weight != kNone) {
      jobs_.push_back({{stage.products, outputs, 0}, nullptr, stage.norm_weight, kNone, kNone, s});
      jobs_.push_back({{stage.sums, outputs, 0}, nullptr, stage.norm_bias, kNone, kNone, s});
    }
  }

  // ---- binding a step's memory ----

  void bind_values(const StepMemory& memory) {
    for (size_t i = 0; i < values_.size(); ++i) {
      values_[i] = static_cast<T*>(memory.parameters[i].value);
    }
  }

  void bind_inputs(const StepMemory& memory) {
    // Only ever read.
    x_->rows.data = const_cast<T*>(static_cast<const T*>(memory.x));
    if (spec_.separate_input) {
      network_input_->rows.data = const_cast<T*>(static_cast<const T*>(memory.network_input));
    }
    for (auto& [width, context] : contexts_) {
      if (memory.context != nullptr) {
        context->rows = {const_cast<T*>(static_cast<const T*>(memory.context)), width, width};
      } else {
        context->rows = own_contexts_[width];
        fill_one_hot(context->rows, static_cast<const int64_t*>(memory.target));
      }
    }
    counted_ = batch_;
    if (spec_.criterion == Criterion::cross_entropy) {
      const auto* labels = static_cast<const int64_t*>(memory.target);
      for (int64_t r = 0; r < batch_; ++r) counted_ -= labels[r] == cpu::kIgnoreIndex;
    }
  }

  void fill_one_hot(const Matrix<T>& context, const int64_t* labels) {
    for (int64_t r = 0; r < batch_; ++r) {
      T* row = context.row(r);
      for (int64_t c = 0; c < context.columns; ++c) row[c] = labels[r] == c;
    }
  }

  Update<T> prepared(const ParameterMemory& memory) {
    const OptimizerSettings& s = memory.settings;
    Update<T> u{};
    u.rule = s.rule;
    u.lr = static_cast<T>(s.lr);
    u.weight_decay = static_cast<T>(s.weight_decay);
    u.a = static_cast<T>(s.a);
    u.b = static_cast<T>(s.b);
    u.eps = static_cast<T>(s.eps);
    u.nesterov = s.nesterov;
    if (s.rule == Rule::sgd_momentum) {
      u.b = static_cast<T>(1 - s.b);
    } else if (s.rule == Rule::adam || s.rule == Rule::adamw) {
      u.lr = static_cast<T>(s.lr / (1 - power(s.a, memory.step)));
      u.root_correction = static_cast<T>(1 / std::sqrt(1 - power(s.b, memory.step)));
      u.a = static_cast<T>(1 - s.a);
      u.one_minus_b = static_cast<T>(1 - s.b);
      if (s.rule == Rule::adamw) u.weight_decay = static_cast<T>(1 - s.lr * s.weight_decay);
    }
    return u;
  }

  // beta^step: most parameters share both.
  double power(double beta, double step) {
    for (const auto& known : powers_) {
      if (known.beta == beta && known.step == step) return known.value;
    }
    std::swap(powers_[0], powers_[1]);
    powers_[0] = {beta, step, std::pow(beta, step)};
    return powers_[0].value;
  }

  // ---- passes ----

  void multiply_rows(const Matrix<T>& a, const T* panels, Rows rows, bool add, const Matrix<T>& c) {
    cpu::multiply<isa, T>(cpu::row_major<T>(a.row(rows.begin), a.stride), panels,
                          rows.end - rows.begin, a.columns, 0, cpu::panels<isa, T>(c.columns),
                          spec_.bfloat16, add, c.row(rows.begin), c.stride);
  }

  void pack_rows(const Activations& input, Rows rows) {
    const int64_t columns = input.rows.columns;
    cpu::pack_rows<isa, T>(input.rows.data, input.rows.stride, batch_, columns, 0,
                           cpu::panels<isa, T>(columns), rows.begin, rows.end, spec_.bfloat16,
                           input.panels);
  }

  static void copy_rows(const T* from, const Matrix<T>& to, Rows rows) {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      std::memcpy(to.row(r), from + r * to.columns, to.columns * sizeof(T));
    }
  }

  const T* value(size_t parameter) const {
    return parameter == kNone ? nullptr : values_[parameter];
  }

  void linear(Stage& stage, Rows rows, int64_t b) {
    multiply_rows(stage.x->rows, stage.weight.forward, rows, false, stage.z);
    if (stage.spec.batch_norm) {
      const int64_t at = b * stage.spec.outputs;
      cpu::column_moments<isa, T>(stage.z, value(stage.bias), rows, stage.block_sums + at,
                                  stage.block_products + at);
    } else {
      cpu::finish_rows<isa, T>(stage.z, value(stage.bias), nullptr, stage.spec.activation, rows);
      if (&stage == &stages_.back()) write_output(stage, rows);
    }
  }

  // Joins the blocks' moments (Chan et al. 1979) in double.
  void statistics(Stage& stage) {
    const int64_t outputs = stage.spec.outputs;
    T* running_mean = nullptr;
    T* running_variance = nullptr;
    double momentum = stage.spec.momentum;
    if (stage.statistics != kNone) {
      running_mean = static_cast<T*>(memory_->statistics[stage.statistics]);
      running_variance = static_cast<T*>(memory_->statistics[stage.statistics + 1]);
      auto* tracked = static_cast<int64_t*>(memory_->statistics[stage.statistics + 2]);
      ++*tracked;
      if (momentum < 0) momentum = 1.0 / *tracked;
    }
    for (int64_t c = 0; c < outputs; ++c) {
      double mean = 0, squares = 0;
      for (int64_t b = 0; b < blocks_; ++b) {
        const Rows rows = block(b);
        mean += static_cast<double>(stage.block_sums[b * outputs + c]) * (rows.end - rows.begin);
      }
      mean /= batch_;
      for (int64_t b = 0; b < blocks_; ++b) {
        const Rows rows = block(b);
        const double off = stage.block_sums[b * outputs + c] - mean;
        squares += stage.block_products[b * outputs + c] + off * off * (rows.end - rows.begin);
      }
      stage.mean[c] = static_cast<T>(mean);
      stage.inverse[c] = static_cast<T>(1 / std::sqrt(squares / batch_ + stage.spec.eps));
      if (running_mean != nullptr) {
        running_mean[c] = static_cast<T>((1 - momentum) * running_mean[c] + momentum * mean);
        running_variance[c] = static_cast<T>((1 - momentum) * running_variance[c] +
                                             momentum * (squares / (batch_ - 1)));
      }
    }
  }

  cpu::BatchNorm<T> norm(const Stage& stage) const {
    return {stage.mean, stage.inverse, value(stage.norm_weight), value(stage.norm_bias)};
  }

  void normalize(Stage& stage, Rows rows) {
    cpu::normalize_rows<isa, T>(stage.z, norm(stage), stage.spec.activation, stage.h->rows, rows);
    if (&stage == &stages_.back()) write_output(stage, rows);
  }

  void write_output(const Stage& stage, Rows rows) {
    auto* output = static_cast<T*>(memory_->output);
    const Matrix<T>& h = stage.made == nullptr ? stage.h->rows : stage.made->prediction->rows;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      std::memcpy(output + r * h.columns, h.row(r), h.columns * sizeof(T));
    }
  }

  void evaluate(Evaluation& evaluation, Rows rows) {
    const Synthesizer& synthesizer = *evaluation.synthesizer;
    const Activations* from = evaluation.trigger;
    for (size_t i = 0; i < synthesizer.weights.size(); ++i) {
      const bool last = i + 1 == synthesizer.weights.size();
      const Activations& to = last ? *evaluation.prediction : *evaluation.hidden[i];
      multiply_rows(from->rows, synthesizer.weights[i].forward, rows, false, to.rows);
      if (i == 0 && synthesizer.context != nullptr) {
        multiply_rows(synthesizer.context->rows, synthesizer.context_weight.forward, rows, true,
                      to.rows);
      }
      cpu::finish_rows<isa, T>(to.rows, value(synthesizer.biases[i]),
                               i == 0 ? value(synthesizer.context_bias) : nullptr,
                               last ? Activation::identity : Activation::relu, rows);
      if (to.panels != nullptr) pack_rows(to, rows);
      from = &to;
    }
  }

  // From the target in the last of `grads` to the gradients of every layer.
  void regress(Evaluation& evaluation, Rows rows, int64_t b) {
    const Synthesizer& synthesizer = *evaluation.synthesizer;
    if (!memory_->active[synthesizer.stage]) return;
    auto& grads = evaluation.grads;
    evaluation.squares[b] = cpu::error_rows<isa, T>(evaluation.prediction->rows, grads.back(),
                                                    static_cast<T>(2.0 / batch_), rows);
    for (size_t i = grads.size() - 1; i > 0; --i) {
      multiply_rows(grads[i], synthesizer.weights[i].backward, rows, false, grads[i - 1]);
      cpu::activation_gradient_rows<isa, T>(grads[i - 1], evaluation.hidden[i - 1]->rows,
                                            Activation::relu, grads[i - 1], rows);
    }
  }

  // The gradient of h, synthetic or the criterion's, and of u.
  void gradient(Stage& stage, size_t s, Rows rows, int64_t b) {
    const Matrix<const T> h = stage.h->rows;
    if (stage.made != nullptr && memory_->active[s + 1]) {
      Matrix<T>& target = stage.made->grads.back();
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        std::memcpy(target.row(r), h.row(r), h.columns * sizeof(T));
      }
      regress(*stage.made, rows, b);
    }
    if (stage.sent == nullptr) criterion(stage, rows, b);
    if (!memory_->active[s]) return;
    const Matrix<const T> grad =
        stage.sent == nullptr ? Matrix<const T>(stage.dz) : stage.sent->prediction->rows;
    cpu::activation_gradient_rows<isa, T>(grad, h, stage.spec.activation, stage.dz, rows);
    if (stage.spec.batch_norm) {
      const int64_t at = b * stage.spec.outputs;
      cpu::column_products<isa, T>(stage.dz, stage.z, rows, stage.block_sums + at,
                                   stage.block_products + at);
    }
  }

  void criterion(const Stage& stage, Rows rows, int64_t b) {
    if (spec_.criterion == Criterion::cross_entropy) {
      criterion_sums_[b] = cpu::cross_entropy_rows<isa, T>(
          stage.h->rows, static_cast<const int64_t*>(memory_->target),
          static_cast<T>(1.0 / std::max(counted_, int64_t{1})), stage.dz, rows);
    } else {
      const double count = static_cast<double>(batch_) * stage.spec.outputs;
      criterion_sums_[b] =
          cpu::squared_error_rows<isa, T>(stage.h->rows, static_cast<const T*>(memory_->target),
                                          static_cast<T>(2 / count), stage.dz, rows);
    }
  }

  void gradient_statistics(Stage& stage) {
    const int64_t outputs = stage.spec.outputs;
    for (int64_t c = 0; c < outputs; ++c) {
      double sum = 0, product = 0;
      for (int64_t b = 0; b < blocks_; ++b) {
        sum += stage.block_sums[b * outputs + c];
        product += stage.block_products[b * outputs + c];
      }
      stage.sums[c] = static_cast<T>(sum);
      stage.products[c] = static_cast<T>(product);
    }
  }

  void normalize_gradient(size_t s, Rows rows) {
    if (!memory_->active[s]) return;
    Stage& stage = stages_[s];
    cpu::normalize_gradient_rows<isa, T>(stage.dz, stage.z, norm(stage), stage.sums, stage.products,
                                         static_cast<T>(batch_), rows);
  }

  // D: delta = dz W, the target of the synthesizer below.
  void propagate(size_t s, Rows rows, int64_t b) {
    if (!memory_->active[s]) return;
    const Stage& stage = stages_[s];
    if (s > 0) {
      Evaluation& below = *regressions_[s - 1];
      multiply_rows(stage.dz, stage.weight.backward, rows, false, below.grads.back());
      regress(below, rows, b);
    } else if (spec_.input_gradient) {
      multiply_rows(stage.dz, stage.weight.backward, rows, false, input_gradient_);
      auto* out = static_cast<T*>(memory_->input_gradient);
      const int64_t columns = input_gradient_.columns;
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        std::memcpy(out + r * columns, input_gradient_.row(r), columns * sizeof(T));
      }
    }
  }

  // ---- losses ----

  void report() {
    if (spec_.criterion == Criterion::none) return;
    double sum = 0;
    for (double part : criterion_sums_) sum += part;
    const double count = spec_.criterion == Criterion::cross_entropy
                             ? static_cast<double>(counted_)
                             : static_cast<double>(batch_) * stages_.back().spec.outputs;
    *static_cast<T*>(memory_->loss) = static_cast<T>(sum / count);
  }

  double loss_of(const Evaluation& evaluation) const {
    if (!memory_->active[evaluation.synthesizer->stage]) {
      return std::numeric_limits<double>::quiet_NaN();
    }
    double sum = 0;
    for (double part : evaluation.squares) sum += part;
    return sum / batch_;
  }

  void report_synthesis() {
    auto* out = static_cast<T*>(memory_->synthesis_loss);
    for (const Evaluation* evaluation : regressions_) *out++ = static_cast<T>(loss_of(*evaluation));
    for (const Stage& stage : stages_) {
      if (stage.made != nullptr) *out++ = static_cast<T>(loss_of(*stage.made));
    }
  }

  // ---- U ----

  // grad^T input -> the weight's gradient, the columns' sums of grad -> those of the biases.
  // Without an input grad is a vector, and the gradient itself.
  struct Job {
    Matrix<T> grad;
    const Activations* input;
    size_t weight, bias, second_bias;
    size_t stage;
  };
  struct Task {
    size_t job;
    int64_t first, last;  // outputs
  };
  struct Packing {
    Weight weight;
    bool backward;
    int64_t panel;
  };

  void add_job(const Matrix<T>& grad, const Activations* input, size_t weight, size_t bias,
               size_t second_bias, size_t stage) {
    jobs_.push_back({grad, input, weight, bias, second_bias, stage});
  }

  void run(const Packing& packing) {
    const Weight& weight = packing.weight;
    const cpu::Strided<T> w = cpu::row_major<T>(value(weight.parameter), weight.inputs);
    if (packing.backward) {
      cpu::pack<isa, T>(w, weight.outputs, weight.inputs, packing.panel, packing.panel + 1,
                        spec_.bfloat16, weight.backward);
    } else {
      cpu::pack<isa, T>(w.transposed(), weight.inputs, weight.outputs, packing.panel,
                        packing.panel + 1, spec_.bfloat16, weight.forward);
    }
  }

  void apply(size_t parameter, const T* grad, int64_t at, int64_t count) {
    const ParameterMemory& memory = memory_->parameters[parameter];
    T* target = values_[parameter] + at;
    const auto beside = [&](void* kept) {
      return kept == nullptr ? target : static_cast<T*>(kept) + at;
    };
    cpu::update<isa, T>(rules_[parameter], grad, target, beside(memory.first),
                        beside(memory.second), count);
  }

  bool updated(size_t parameter) const {
    return parameter != kNone && rules_[parameter].rule != Rule::none;
  }

  void run(const Task& task) {
    const Job& job = jobs_[task.job];
    if (!memory_->active[job.stage]) return;
    const int64_t outputs = task.last - task.first;
    if (job.input == nullptr) {
      if (updated(job.weight)) apply(job.weight, job.grad.data + task.first, task.first, outputs);
      return;
    }
    if (updated(job.weight)) update_weight(job, task.first, outputs);
    if (updated(job.bias) || updated(job.second_bias)) {
      T sums[kLargeBlockRows];
      cpu::sum_columns<isa, T>(job.grad, batch_, task.first, task.last, sums);
      for (size_t bias : {job.bias, job.second_bias}) {
        if (updated(bias)) apply(bias, sums, task.first, outputs);
      }
    }
  }

  void update_weight(const Job& job, int64_t first, int64_t outputs) {
    constexpr int64_t kWidth = cpu::kPanelWidth<isa, T>;
    constexpr int64_t kUpdatePanels = kUpdateColumns / kWidth;
    alignas(64) T grad[kLargeBlockRows * kUpdateColumns];
    const int64_t inputs = job.input->rows.columns, panels = cpu::panels<isa, T>(inputs);
    const cpu::Strided<T> left{job.grad.data + first, 1, job.grad.stride};
    for (int64_t p = 0; p < panels; p += kUpdatePanels) {
      const int64_t end = std::min(p + kUpdatePanels, panels), stride = (end - p) * kWidth;
      cpu::multiply<isa, T>(left, job.input->panels, outputs, batch_, p, end, spec_.bfloat16, false,
                            grad, stride);
      if (stride == inputs) {
        apply(job.weight, grad, first * inputs, outputs * inputs);
        continue;
      }
      const int64_t columns = std::min(end * kWidth, inputs) - p * kWidth;
      for (int64_t r = 0; r < outputs; ++r) {
        apply(job.weight, grad + r * stride, (first + r) * inputs + p * kWidth, columns);
      }
    }
  }

  NetworkSpec spec_;
  int64_t batch_, blocks_;
  int64_t bytes_ = 0, row_work_ = 0, pack_work_ = 0, update_work_ = 0;
  std::vector<std::unique_ptr<T, Free>> memory_blocks_;
  size_t next_parameter_ = 0, next_statistic_ = 0;

  // Deques: what points into them stays valid.
  std::deque<Activations> activations_;
  std::deque<Synthesizer> synthesizers_;
  std::deque<Evaluation> evaluations_;
  std::deque<Stage> stages_;
  Activations* x_ = nullptr;
  Activations* network_input_ = nullptr;      // what input synthesizers predict from
  std::map<int64_t, Activations*> contexts_;  // by width
  std::map<int64_t, Matrix<T>> own_contexts_;
  std::vector<Evaluation*> regressions_;  // of M, by boundary
  Matrix<T> input_gradient_;
  std::vector<double> criterion_sums_;  // by block

  Program forward_program_, regression_program_;
  std::vector<Packing> packings_;
  std::vector<Job> jobs_;
  std::vector<Task> tasks_;

  // Of the step at work.
  const StepMemory* memory_ = nullptr;
  std::vector<T*> values_;
  std::vector<Update<T>> rules_;
  int64_t counted_ = 0;  // rows that the criterion counts
  struct Power {
    double beta = 0, step = 0, value = 0;
  };
  Power powers_[2];
};

}  // namespace

std::unique_ptr<Sweep> make_cpu_sweep(const NetworkSpec& spec) {
  std::unique_ptr<Sweep> sweep;
  cpu::with_isa([&](auto isa) {
    if (spec.dtype == ScalarType::Double) {
      sweep = std::make_unique<CpuSweep<isa.value, double>>(spec);
    } else {
      sweep = std::make_unique<CpuSweep<isa.value, float>>(spec);
    }
  });
  return sweep;
}

}  // namespace fastdni
