// The sweep on the CPU: one program of passes over blocks of rows (F, S and D of every stage), and
// one list of tasks (every weight gradient with its optimizer). Nothing here depends on the number
// of threads: blocks and tasks follow from the shapes, and sums over the batch from the blocks in
// order.
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <map>

#include "ops/range.h"
#include "ops/sweep_memory.h"
#include "ops/sweep_plan.h"
#include "ops/sweep_updates.h"

namespace fastdni {
namespace sweep {
namespace {

template <Isa isa, class T>
class CpuSweep final : public Sweep {
 public:
  explicit CpuSweep(const NetworkSpec& spec)
      : spec_(spec),
        batch_(spec.batch),
        blocks_(pieces<T>(spec.batch, largest_weight(spec))),
        arena_(spec.batch),
        bfloat16_(spec.products == Products::bfloat16),
        updates_(spec.batch, bfloat16_) {
    build();
    values_.resize(next_parameter_);
  }

  int64_t workspace_bytes() const override { return arena_.bytes(); }

  void forward(const StepMemory& memory) override {
    memory_ = &memory;
    bind_values(memory);
    bind_inputs(memory);
    {
      const Range range("fastdni::sweep pack weights");
      in_parallel(packings_.size(), pack_work_, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) run(packings_[i]);
      });
    }
    run(forward_program_);
    report();
  }

  void update(const StepMemory& memory) override {
    memory_ = &memory;
    if (memory.gradient != nullptr) run(regression_program_);
    report_synthesis();
    updates_.run(memory);
  }

 private:
  static int64_t largest_weight(const NetworkSpec& spec) {
    int64_t largest = 0;
    for (const StageSpec& stage : spec.stages) {
      largest = std::max(largest, stage.inputs * stage.outputs);
    }
    return largest;
  }

  // ---- what the network is made of ----

  // A weight (outputs, inputs) in panels: of its transpose for x W^T, of itself for dz W.
  struct Weight {
    size_t parameter = 0;
    int64_t outputs = 0, inputs = 0;
    T* forward = nullptr;
    T* backward = nullptr;
  };

  struct Synthesizer {
    std::vector<Weight> weights;
    std::vector<size_t> biases;
    Weight context_weight;
    size_t context_bias = kNone;
    Activations<T>* context = nullptr;
    size_t stage = 0;  // the one above its boundary, whose mask it shares
  };

  // A synthesizer at one trigger. `grads` are those of its layers' outputs; the last holds the
  // target first, then (2 / B) e.
  struct Evaluation {
    Synthesizer* synthesizer = nullptr;
    Activations<T>* trigger = nullptr;
    std::vector<Activations<T>*> hidden;
    Activations<T>* prediction = nullptr;
    std::vector<Matrix<T>> grads;
    std::vector<double> squares;  // by block
  };

  // One panel of a weight, to be packed at the start of a step.
  struct Packing {
    Weight weight;
    bool backward;
    int64_t panel;
  };

  struct Stage {
    StageSpec spec;
    Weight weight;
    size_t bias = kNone, norm_weight = kNone, norm_bias = kNone, statistics = kNone;
    Activations<T>* x = nullptr;
    Activations<T>* h = nullptr;
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
    const int64_t group = std::max(kGroupRows * blocks_ / batch_, int64_t{1});
    for (size_t begin = 0; begin < program.size();) {
      if (program[begin].over_all) {
        program[begin++].over_all();
        continue;
      }
      size_t end = begin;
      while (end < program.size() && program[end].over_rows) ++end;
      in_parallel(blocks_, row_work_ * (end - begin) / program.size() + 1,
                  [&](int64_t first, int64_t last) {
                    for (int64_t from = first; from < last; from += group) {
                      const int64_t to = std::min(from + group, last);
                      for (size_t i = begin; i < end; ++i) {
                        for (int64_t b = from; b < to; ++b) program[i].over_rows(block(b), b);
                      }
                    }
                  });
      begin = end;
    }
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
    Weight weight{take_parameter(), outputs, inputs,
                  arena_.allocate(inputs * cpu::padded<isa, T>(outputs)), nullptr};
    pack_later(weight, false);
    if (backward) {
      weight.backward = arena_.allocate(outputs * cpu::padded<isa, T>(inputs));
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
      Activations<T>*& context = contexts_[spec.context];
      if (context == nullptr) {
        context = arena_.activations(spec.context, true, true);
        own_contexts_[spec.context] = context->rows;
      }
      synthesizer.context = context;
    }
    return &synthesizer;
  }

  // `regressed`: whether this is the evaluation that the synthesizer is trained at.
  Evaluation* evaluate_later(Synthesizer* synthesizer, Activations<T>* trigger, bool regressed,
                             bool prediction_panels, Program& program) {
    evaluations_.emplace_back();
    Evaluation& evaluation = evaluations_.back();
    evaluation.synthesizer = synthesizer;
    evaluation.trigger = trigger;
    for (const Weight& weight : synthesizer->weights) {
      const bool last = &weight == &synthesizer->weights.back();
      Activations<T>* out =
          arena_.activations(weight.outputs, true, last ? prediction_panels : regressed);
      if (last) {
        evaluation.prediction = out;
      } else {
        evaluation.hidden.push_back(out);
      }
      if (regressed) evaluation.grads.push_back(arena_.matrix(weight.outputs));
    }
    evaluation.squares.assign(blocks_, 0);
    program.push_back(
        {[this, &evaluation](Rows rows, int64_t) { evaluate(evaluation, rows); }, {}});
    if (regressed) {
      updates_.add(evaluation.grads[0], trigger, synthesizer->weights[0].parameter,
                   synthesizer->biases[0], synthesizer->context_bias, synthesizer->stage);
      if (synthesizer->context != nullptr) {
        updates_.add(evaluation.grads[0], synthesizer->context,
                     synthesizer->context_weight.parameter, kNone, kNone, synthesizer->stage);
      }
      for (size_t i = 1; i < synthesizer->weights.size(); ++i) {
        updates_.add(evaluation.grads[i], evaluation.hidden[i - 1],
                     synthesizer->weights[i].parameter, synthesizer->biases[i], kNone,
                     synthesizer->stage);
      }
    }
    return &evaluation;
  }

  void pack_later(Activations<T>* input, Program& program) {
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

    x_ = arena_.activations(spec_.stages[0].inputs, false, true);
    pack_later(x_, program);
    network_input_ = x_;
    if (spec_.separate_input) {
      const int64_t width = spec_.stages[0].input_synthesizer.widths.front();
      network_input_ = arena_.activations(width, false, true);
      pack_later(network_input_, program);
    }
    for (const auto& [width, context] : contexts_) pack_later(context, program);

    for (size_t s = 0; s < stages_.size(); ++s) {
      Stage& stage = stages_[s];
      stage.x = s == 0 ? x_ : unlocked ? stages_[s - 1].made->prediction : stages_[s - 1].h;
      stage.h = arena_.activations(stage.spec.outputs, true,
                                   gradient_synthesizers[s] != nullptr && !unlocked);
      stage.z = stage.spec.batch_norm ? arena_.matrix(stage.spec.outputs) : stage.h->rows;
      stage.dz = arena_.matrix(stage.spec.outputs);
      if (unlocked && input_synthesizers[s] != nullptr) {
        stage.made = evaluate_later(input_synthesizers[s], network_input_, true, true, program);
      }
      updates_.add(stage.dz, stage.x, stage.weight.parameter, stage.bias, kNone, s);
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

    if (spec_.input_gradient) input_gradient_ = arena_.matrix(spec_.stages[0].inputs);
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
  }

  void build_norm(Stage& stage, size_t s) {
    const int64_t outputs = stage.spec.outputs;
    stage.mean = arena_.allocate(outputs);
    stage.inverse = arena_.allocate(outputs);
    stage.sums = arena_.allocate(outputs);
    stage.products = arena_.allocate(outputs);
    stage.block_sums = arena_.allocate(blocks_ * outputs);
    stage.block_products = arena_.allocate(blocks_ * outputs);
    if (stage.norm_weight != kNone) {
      updates_.add({stage.products, outputs, 0}, nullptr, stage.norm_weight, kNone, kNone, s);
      updates_.add({stage.sums, outputs, 0}, nullptr, stage.norm_bias, kNone, kNone, s);
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

  // ---- passes ----

  void multiply_rows(const Matrix<T>& a, const T* panels, Rows rows, bool add, const Matrix<T>& c) {
    cpu::multiply<isa, T>(cpu::row_major<T>(a.row(rows.begin), a.stride), panels,
                          rows.end - rows.begin, a.columns, 0, cpu::panels<isa, T>(c.columns),
                          bfloat16_, add, c.row(rows.begin), c.stride);
  }

  void pack_rows(const Activations<T>& input, Rows rows) {
    const int64_t columns = input.rows.columns;
    cpu::pack_rows<isa, T>(input.rows.data, input.rows.stride, batch_, columns, 0,
                           cpu::panels<isa, T>(columns), rows.begin, rows.end, bfloat16_,
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
    const Activations<T>* from = evaluation.trigger;
    for (size_t i = 0; i < synthesizer.weights.size(); ++i) {
      const bool last = i + 1 == synthesizer.weights.size();
      const Activations<T>& to = last ? *evaluation.prediction : *evaluation.hidden[i];
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
    evaluation.squares[b] =
        cpu::error_rows<isa, T>(evaluation.prediction->rows, grads.back(),
                                static_cast<T>(2.0 / batch_), grads.back(), rows);
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
      const Matrix<const T> target{static_cast<const T*>(memory_->target), stage.spec.outputs,
                                   stage.spec.outputs};
      criterion_sums_[b] =
          cpu::error_rows<isa, T>(stage.h->rows, target, static_cast<T>(2 / count), stage.dz, rows);
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

  void run(const Packing& packing) {
    const Weight& weight = packing.weight;
    const cpu::Strided<T> w = cpu::row_major<T>(value(weight.parameter), weight.inputs);
    if (packing.backward) {
      cpu::pack<isa, T>(w, weight.outputs, weight.inputs, packing.panel, packing.panel + 1,
                        bfloat16_, weight.backward);
    } else {
      cpu::pack<isa, T>(w.transposed(), weight.inputs, weight.outputs, packing.panel,
                        packing.panel + 1, bfloat16_, weight.forward);
    }
  }

  NetworkSpec spec_;
  int64_t batch_, blocks_;
  int64_t row_work_ = 0, pack_work_ = 0;
  Arena<isa, T> arena_;
  bool bfloat16_;
  Updates<isa, T> updates_;
  size_t next_parameter_ = 0, next_statistic_ = 0;

  // Deques: what points into them stays valid.
  std::deque<Synthesizer> synthesizers_;
  std::deque<Evaluation> evaluations_;
  std::deque<Stage> stages_;
  Activations<T>* x_ = nullptr;
  Activations<T>* network_input_ = nullptr;      // what input synthesizers predict from
  std::map<int64_t, Activations<T>*> contexts_;  // by width
  std::map<int64_t, Matrix<T>> own_contexts_;
  std::vector<Evaluation*> regressions_;  // of M, by boundary
  Matrix<T> input_gradient_;
  std::vector<double> criterion_sums_;  // by block

  Program forward_program_, regression_program_;
  std::vector<Packing> packings_;

  // Of the step at work.
  const StepMemory* memory_ = nullptr;
  std::vector<T*> values_;
  int64_t counted_ = 0;  // rows that the criterion counts
};

}  // namespace
}  // namespace sweep

std::unique_ptr<Sweep> make_cpu_sweep(const NetworkSpec& spec, ScalarType dtype) {
  std::unique_ptr<Sweep> made;
  cpu::with_isa([&](auto isa) {
    if (dtype == ScalarType::Double) {
      made = std::make_unique<sweep::CpuSweep<isa.value, double>>(spec);
    } else {
      made = std::make_unique<sweep::CpuSweep<isa.value, float>>(spec);
    }
  });
  return made;
}

}  // namespace fastdni
