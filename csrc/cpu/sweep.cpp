// The sweep on the CPU: one program of passes over blocks of rows (F, S and D of every stage), and
// one list of tasks (every weight gradient with its optimizer). Nothing here depends on the number
// of threads: blocks and tasks follow from the shapes, and sums over the batch from the blocks in
// order.
#include "ops/sweep.h"

#include <functional>
#include <map>

#include "cpu/sweep_passes.h"
#include "cpu/sweep_stages.h"
#include "cpu/sweep_updates.h"
#include "ops/range.h"
#include "ops/sweep_plan.h"

namespace fastdni::cpu {
namespace {

template <Isa isa, class T>
class CpuSweep final : public Sweep {
 public:
  explicit CpuSweep(const NetworkSpec& spec)
      : signature_(spec),
        arena_(spec.batch),
        updates_(spec.batch, spec.precision == Precision::bfloat16) {
    net_.spec = spec;
    net_.batch = spec.batch;
    net_.blocks = pieces<T>(spec.batch, largest_weight(spec));
    net_.bfloat16 = spec.precision == Precision::bfloat16;
    build();
    net_.values.resize(signature_.parameters.size());
  }

  int64_t workspace_bytes() const override { return arena_.bytes(); }

  void forward(const StepMemory& memory) override {
    net_.memory = &memory;
    bind_values(memory);
    bind_inputs(memory);
    {
      const Range range("fastdni::sweep pack weights");
      in_parallel(packings_.size(), pack_work_, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) run(packings_[i]);
      });
    }
    run(forward_program_);
    passes_.report();
  }

  void update(const StepMemory& memory) override {
    net_.memory = &memory;
    if (memory.gradient != nullptr) run(regression_program_);
    passes_.report_synthesis();
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

  // ---- programs: passes over blocks of rows, and what has to wait for all of them ----

  struct Pass {
    std::function<void(Rows, int64_t)> over_rows;
    std::function<void()> over_all;  // instead
  };
  using Program = std::vector<Pass>;

  void run(const Program& program) {
    const int64_t group = std::max(kGroupRows * net_.blocks / net_.batch, int64_t{1});
    for (size_t begin = 0; begin < program.size();) {
      if (program[begin].over_all) {
        program[begin++].over_all();
        continue;
      }
      size_t end = begin;
      while (end < program.size() && program[end].over_rows) ++end;
      in_parallel(net_.blocks, row_work_ * (end - begin) / program.size() + 1,
                  [&](int64_t first, int64_t last) {
                    for (int64_t from = first; from < last; from += group) {
                      const int64_t to = std::min(from + group, last);
                      for (size_t i = begin; i < end; ++i) {
                        for (int64_t b = from; b < to; ++b) program[i].over_rows(net_.block(b), b);
                      }
                    }
                  });
      begin = end;
    }
  }

  // ---- weights in panels, packed at the start of a step ----

  // One panel of a weight.
  struct Packing {
    Weight<T> weight;
    bool backward;
    int64_t panel;
  };

  void run(const Packing& packing) {
    const Weight<T>& weight = packing.weight;
    const cpu::Strided<T> w = cpu::row_major<T>(net_.value(weight.parameter), weight.inputs);
    if (packing.backward) {
      cpu::pack<isa, T>(w, weight.outputs, weight.inputs, packing.panel, packing.panel + 1,
                        net_.bfloat16, weight.backward);
    } else {
      cpu::pack<isa, T>(w.transposed(), weight.inputs, weight.outputs, packing.panel,
                        packing.panel + 1, net_.bfloat16, weight.forward);
    }
  }

  // ---- building ----

  void pack_later(const Weight<T>& weight, bool backward) {
    const int64_t columns = backward ? weight.inputs : weight.outputs;
    for (int64_t p = 0; p < cpu::panels<isa, T>(columns); ++p) {
      packings_.push_back({weight, backward, p});
    }
    // A panel's element costs about as much as eight multiply-adds.
    pack_work_ += 8 * weight.outputs * weight.inputs;
    row_work_ += net_.batch * weight.outputs * weight.inputs;
  }

  Weight<T> make_weight(int32_t parameter, int64_t outputs, int64_t inputs, bool backward) {
    Weight<T> weight{parameter, outputs, inputs,
                     arena_.allocate(inputs * cpu::padded<isa, T>(outputs)), nullptr};
    pack_later(weight, false);
    if (backward) {
      weight.backward = arena_.allocate(outputs * cpu::padded<isa, T>(inputs));
      pack_later(weight, true);
    }
    return weight;
  }

  // None where the boundary has none.
  Synthesizer<T>* make_synthesizer(const SynthesizerSpec& spec,
                                   const SynthesizerParameters& numbers, size_t stage) {
    if (!spec.present()) return nullptr;
    net_.synthesizers.emplace_back();
    Synthesizer<T>& synthesizer = net_.synthesizers.back();
    synthesizer.stage = stage;
    for (size_t i = 0; i < numbers.weights.size(); ++i) {
      synthesizer.weights.push_back(
          make_weight(numbers.weights[i], spec.widths[i + 1], spec.widths[i], i > 0));
    }
    synthesizer.biases = numbers.biases;
    if (spec.context > 0) {
      synthesizer.context_weight =
          make_weight(numbers.context_weight, spec.widths[1], spec.context, false);
      synthesizer.context_bias = numbers.context_bias;
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
  Evaluation<T>* evaluate_later(Synthesizer<T>* synthesizer, Activations<T>* trigger,
                                bool regressed, bool prediction_panels, Program& program) {
    net_.evaluations.emplace_back();
    Evaluation<T>& evaluation = net_.evaluations.back();
    evaluation.synthesizer = synthesizer;
    evaluation.trigger = trigger;
    for (const Weight<T>& weight : synthesizer->weights) {
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
    evaluation.squares.assign(net_.blocks, 0);
    program.push_back(
        {[this, &evaluation](Rows rows, int64_t) { passes_.evaluate(evaluation, rows); }, {}});
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
    program.push_back({[this, input](Rows rows, int64_t) { passes_.pack_rows(*input, rows); }, {}});
  }

  void build() {
    const bool unlocked = net_.spec.unlocked();
    Program& program = forward_program_;
    std::vector<Synthesizer<T>*> gradient_synthesizers, input_synthesizers;
    for (size_t s = 0; s < net_.spec.stages.size(); ++s) {
      net_.stages.emplace_back();
      Stage<T>& stage = net_.stages.back();
      const StageSpec& spec = stage.spec = net_.spec.stages[s];
      const StageParameters& numbers = stage.numbers = signature_.stages[s];
      stage.weight =
          make_weight(numbers.weight, spec.outputs, spec.inputs, s > 0 || net_.spec.input_gradient);
      gradient_synthesizers.push_back(
          make_synthesizer(spec.synthesizer, numbers.synthesizer, s + 1));
      input_synthesizers.push_back(
          make_synthesizer(spec.input_synthesizer, numbers.input_synthesizer, s + 1));
    }

    x_ = arena_.activations(net_.spec.stages[0].inputs, false, true);
    pack_later(x_, program);
    network_input_ = x_;
    if (net_.spec.separate_input) {
      const int64_t width = net_.spec.stages[0].input_synthesizer.widths.front();
      network_input_ = arena_.activations(width, false, true);
      pack_later(network_input_, program);
    }
    for (const auto& [width, context] : contexts_) pack_later(context, program);

    int32_t dropouts = 0;
    for (size_t s = 0; s < net_.stages.size(); ++s) {
      Stage<T>& stage = net_.stages[s];
      stage.x = s == 0     ? x_
                : unlocked ? net_.stages[s - 1].next_input->prediction
                           : net_.stages[s - 1].h;
      stage.h = arena_.activations(stage.spec.outputs, true,
                                   gradient_synthesizers[s] != nullptr && !unlocked);
      stage.phi = stage.spec.dropout ? arena_.matrix(stage.spec.outputs) : stage.h->rows;
      if (stage.spec.dropout) stage.noise = dropouts++;
      stage.z = stage.spec.batch_norm ? arena_.matrix(stage.spec.outputs) : stage.phi;
      stage.dz = arena_.matrix(stage.spec.outputs);
      if (unlocked && input_synthesizers[s] != nullptr) {
        stage.next_input =
            evaluate_later(input_synthesizers[s], network_input_, true, true, program);
      }
      updates_.add(stage.dz, stage.x, stage.weight.parameter, stage.numbers.bias, kNone, s);
      if (stage.spec.batch_norm) build_norm(stage, s);
    }

    // A stage whose dz waits for sums over the batch is finished after the next wait for all rows,
    // which the next stage's statistics need anyway.
    std::vector<size_t> waiting;
    const auto wait = [&] {
      program.push_back({{}, [this, waiting] {
                           for (size_t s : waiting) passes_.gradient_statistics(net_.stages[s]);
                         }});
      for (size_t s : waiting) {
        program.push_back({[this, s](Rows rows, int64_t b) {
                             passes_.normalize_gradient(s, rows);
                             passes_.propagate(s, rows, b);
                           },
                           {}});
      }
      waiting.clear();
    };

    for (size_t s = 0; s < net_.stages.size(); ++s) {
      Stage<T>& stage = net_.stages[s];
      program.push_back(
          {[this, &stage](Rows rows, int64_t b) { passes_.linear(stage, rows, b); }, {}});
      if (stage.spec.batch_norm) {
        program.push_back({{}, [this, &stage] { passes_.statistics(stage); }});
        if (!waiting.empty()) wait();
        program.push_back(
            {[this, &stage](Rows rows, int64_t) { passes_.normalize(stage, rows); }, {}});
      }
      if (stage.h->panels != nullptr) pack_later(stage.h, program);
      if (gradient_synthesizers[s] != nullptr) {
        stage.sent = evaluate_later(gradient_synthesizers[s], stage.h, !unlocked, false, program);
        Evaluation<T>* regressed = stage.sent;
        if (unlocked) {
          regressed = evaluate_later(gradient_synthesizers[s], stage.next_input->prediction, true,
                                     false, program);
        }
        net_.regressions.push_back(regressed);
      }
      program.push_back(
          {[this, &stage, s](Rows rows, int64_t b) { passes_.gradient(stage, s, rows, b); }, {}});
      if (stage.spec.batch_norm) {
        waiting.push_back(s);
      } else {
        program.push_back({[this, s](Rows rows, int64_t b) { passes_.propagate(s, rows, b); }, {}});
      }
    }
    if (!waiting.empty()) wait();

    if (net_.spec.input_gradient) net_.input_gradient = arena_.matrix(net_.spec.stages[0].inputs);
    net_.criterion_sums.assign(net_.blocks, 0);
    if (gradient_synthesizers.back() != nullptr) {
      regression_program_.push_back(
          {[this](Rows rows, int64_t b) { passes_.regress_top(rows, b); }, {}});
    }
  }

  void build_norm(Stage<T>& stage, size_t s) {
    const int64_t outputs = stage.spec.outputs;
    stage.mean = arena_.allocate(outputs);
    stage.inverse = arena_.allocate(outputs);
    stage.sums = arena_.allocate(outputs);
    stage.dots = arena_.allocate(outputs);
    stage.block_sums = arena_.allocate(net_.blocks * outputs);
    stage.block_dots = arena_.allocate(net_.blocks * outputs);
    if (stage.numbers.norm_weight != kNone) {
      updates_.add({stage.dots, outputs, 0}, nullptr, stage.numbers.norm_weight, kNone, kNone, s);
      updates_.add({stage.sums, outputs, 0}, nullptr, stage.numbers.norm_bias, kNone, kNone, s);
    }
  }

  // ---- binding a step's memory ----

  void bind_values(const StepMemory& memory) {
    for (size_t i = 0; i < net_.values.size(); ++i) {
      net_.values[i] = static_cast<T*>(memory.parameters[i].value);
    }
  }

  void bind_inputs(const StepMemory& memory) {
    // Only ever read.
    x_->rows.data = const_cast<T*>(static_cast<const T*>(memory.x));
    if (net_.spec.separate_input) {
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
    net_.counted = net_.batch;
    if (net_.spec.criterion == Criterion::cross_entropy) {
      const auto* labels = static_cast<const int64_t*>(memory.target);
      for (int64_t r = 0; r < net_.batch; ++r) net_.counted -= labels[r] == kIgnoreIndex;
    }
  }

  void fill_one_hot(const Matrix<T>& context, const int64_t* labels) {
    for (int64_t r = 0; r < net_.batch; ++r) {
      T* row = context.row(r);
      for (int64_t c = 0; c < context.columns; ++c) row[c] = labels[r] == c;
    }
  }

  CpuNetwork<T> net_;
  Signature signature_;
  Passes<isa, T> passes_{net_};
  int64_t row_work_ = 0, pack_work_ = 0;
  Arena<isa, T> arena_;
  Updates<isa, T> updates_;
  Activations<T>* x_ = nullptr;
  Activations<T>* network_input_ = nullptr;      // what input synthesizers predict from
  std::map<int64_t, Activations<T>*> contexts_;  // by width
  std::map<int64_t, Matrix<T>> own_contexts_;
  Program forward_program_, regression_program_;
  std::vector<Packing> packings_;
};

std::unique_ptr<Sweep> make_sweep(const NetworkSpec& spec, ScalarType dtype) {
  std::unique_ptr<Sweep> made;
  with_isa([&](auto isa) {
    if (dtype == ScalarType::Double) {
      made = std::make_unique<CpuSweep<isa.value, double>>(spec);
    } else {
      made = std::make_unique<CpuSweep<isa.value, float>>(spec);
    }
  });
  return made;
}

const SweepBackend backend(Device::cpu, &make_sweep);

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdni, CPU, m) { implement_sweep(m); }

}  // namespace fastdni::cpu
