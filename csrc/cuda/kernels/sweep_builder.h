// Writes a network's program.
//
// The order of things is that of csrc/cpu/sweep.cpp, the letters those of
// fastdni/reference/sweep.py.
#pragma once
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "common/parameters.h"
#include "cuda/kernels/sweep_library.h"
#include "cuda/kernels/sweep_phases.h"
#include "cuda/kernels/sweep_program.h"

namespace fastdni::cuda {

class SweepProgramBuilder {
 public:
  explicit SweepProgramBuilder(const NetworkSpec& spec) : spec_(spec) {
    program_.row_blocks = (spec.batch + kSweepRows - 1) / kSweepRows;
    build();
    divide_sums();
  }

  SweepProgram take() { return std::move(program_); }

 private:
  struct Synthesizer {
    SynthesizerParameters numbers;
    std::vector<int64_t> widths;
    int32_t context = 0;
    int32_t stage = 0;  // the one above its boundary, whose mask it shares
  };

  // A synthesizer at one trigger; `grads` are those of its layers' outputs.
  struct Evaluation {
    const Synthesizer* synthesizer = nullptr;
    Operand prediction;
    std::vector<Operand> hidden, grads;
    int64_t partials = -1;
  };

  struct Stage {
    const StageSpec* spec = nullptr;
    StageParameters numbers;
    const Synthesizer* m = nullptr;
    const Synthesizer* i = nullptr;
    Operand x, h, z, dz;
    int64_t statistics = -1, partials = -1;
    Evaluation* sent = nullptr;        // M at h
    Evaluation* next_input = nullptr;  // I at x, in complete unlock
    Evaluation* regressed = nullptr;   // where M is trained
  };

  Operand allocate(int64_t elements) { return program_.allocate(elements); }
  Operand matrix(int64_t columns) { return allocate(spec_.batch * columns); }
  int64_t partial_sums(int64_t columns) {
    return allocate(program_.row_blocks * column_tiles(columns)).at;
  }
  static Operand parameter(int32_t number) {
    return number == kNone ? Operand{} : Operand{Place::parameter, number};
  }

  const Synthesizer* make_synthesizer(const SynthesizerSpec& spec,
                                      const SynthesizerParameters& numbers, int32_t stage) {
    if (!spec.present()) return nullptr;
    return &synthesizers_.emplace_back(
        Synthesizer{numbers, spec.widths, static_cast<int32_t>(spec.context), stage});
  }

  void make_stages() {
    const Signature signature(spec_);
    for (size_t s = 0; s < spec_.stages.size(); ++s) {
      const StageSpec& spec = spec_.stages[s];
      Stage& stage = stages_.emplace_back();
      stage.spec = &spec;
      stage.numbers = signature.stages[s];
      const auto above = static_cast<int32_t>(s + 1);
      stage.m = make_synthesizer(spec.synthesizer, stage.numbers.synthesizer, above);
      stage.i = make_synthesizer(spec.input_synthesizer, stage.numbers.input_synthesizer, above);
    }
  }

  // ---- segments ----

  void begin() { open_ = {reductions(), reductions(), 0, 0, instructions(), instructions()}; }
  void end(std::vector<Segment>& segments) {
    open_.reduce_last = reductions();
    open_.last = instructions();
    segments.push_back(open_);
    begin();
  }
  int32_t instructions() const { return static_cast<int32_t>(program_.instructions.size()); }
  int32_t reductions() const { return static_cast<int32_t>(program_.reductions.size()); }

  Instruction& add(Op op, int64_t columns, int32_t stage) {
    Instruction& made = program_.instructions.emplace_back();
    made.op = op;
    made.columns = static_cast<int32_t>(columns);
    made.stage = stage;
    return made;
  }

  void reduce(const Stage& stage, size_t s, bool of_gradient) {
    Reduction made;
    made.stage = static_cast<int32_t>(s);
    made.columns = static_cast<int32_t>(stage.spec->outputs);
    made.of_gradient = of_gradient;
    made.partials = stage.partials;
    made.statistics = stage.statistics;
    made.running = of_gradient ? -1 : stage.numbers.running;
    made.momentum = stage.spec->momentum;
    made.eps = stage.spec->eps;
    program_.reductions.push_back(made);
  }

  // ---- instructions ----

  // Of a stage, where it gives the gradient that the stage goes on with.
  Evaluation* evaluate(const Synthesizer* synthesizer, Operand trigger, bool regressed,
                       const Stage* stage = nullptr) {
    Evaluation& made = evaluations_.emplace_back();
    made.synthesizer = synthesizer;
    const size_t layers = synthesizer->numbers.weights.size();
    Operand from = trigger;
    for (size_t i = 0; i < layers; ++i) {
      const bool last = i + 1 == layers;
      const int64_t outputs = synthesizer->widths[i + 1];
      const Operand to = matrix(outputs);
      Instruction& layer = add(Op::product, outputs, -1);
      layer.depth = static_cast<int32_t>(synthesizer->widths[i]);
      layer.a = from;
      layer.weight = parameter(synthesizer->numbers.weights[i]);
      layer.bias = parameter(synthesizer->numbers.biases[i]);
      if (i == 0 && synthesizer->context > 0) {
        layer.context = synthesizer->context;
        layer.context_weight = parameter(synthesizer->numbers.context_weight);
        layer.second_bias = parameter(synthesizer->numbers.context_bias);
      }
      layer.activation = last ? Activation::identity : Activation::relu;
      layer.out = to;
      if (last && stage != nullptr) {
        layer.finish = Finish::synthesize;
        layer.activation = stage->spec->activation;
        layer.other = stage->h;
        layer.dz = stage->dz;
      }
      if (last) {
        made.prediction = to;
      } else {
        made.hidden.push_back(to);
      }
      if (regressed) made.grads.push_back(matrix(outputs));
      from = to;
    }
    if (!regressed) return &made;
    made.partials = partial_sums(synthesizer->widths.back());
    from = trigger;
    for (size_t i = 0; i < layers; ++i) {
      Job job;
      job.grad = made.grads[i];
      job.input = from;
      job.outputs = static_cast<int32_t>(synthesizer->widths[i + 1]);
      job.inputs = static_cast<int32_t>(synthesizer->widths[i]);
      job.weight = synthesizer->numbers.weights[i];
      job.bias = synthesizer->numbers.biases[i];
      job.stage = synthesizer->stage;
      if (i == 0) job.second_bias = synthesizer->numbers.context_bias;
      program_.jobs.push_back(job);
      if (i == 0 && synthesizer->context > 0) {
        job.input = {Place::context, 0};
        job.inputs = synthesizer->context;
        job.weight = synthesizer->numbers.context_weight;
        job.bias = job.second_bias = -1;
        program_.jobs.push_back(job);
      }
      if (i + 1 < layers) from = made.hidden[i];
    }
    return &made;
  }

  // The target of an evaluation is what `target` computes.
  void regress(const Evaluation& evaluation, Instruction target, int32_t stage) {
    const Synthesizer& synthesizer = *evaluation.synthesizer;
    target.finish = Finish::regress;
    target.columns = static_cast<int32_t>(synthesizer.widths.back());
    target.stage = stage;
    target.other = evaluation.prediction;
    target.out = evaluation.grads.back();
    target.partials = evaluation.partials;
    program_.instructions.push_back(target);
    for (size_t i = evaluation.grads.size() - 1; i > 0; --i) {
      Instruction& layer = add(Op::product, synthesizer.widths[i], stage);
      layer.a = evaluation.grads[i];
      layer.depth = static_cast<int32_t>(synthesizer.widths[i + 1]);
      layer.weight = parameter(synthesizer.numbers.weights[i]);
      layer.transposed = true;
      layer.finish = Finish::differentiate;
      layer.activation = Activation::relu;
      layer.other = evaluation.hidden[i - 1];
      layer.out = evaluation.grads[i - 1];
    }
  }

  static Instruction itself(Operand matrix) {
    Instruction made;
    made.a = matrix;
    return made;
  }

  // delta = dz W
  Instruction delta(const Stage& stage) const {
    Instruction made = itself(stage.dz);
    made.depth = static_cast<int32_t>(stage.spec->outputs);
    made.weight = parameter(stage.numbers.weight);
    made.transposed = true;
    return made;
  }

  void linear(Stage& stage) {
    Instruction& layer = add(Op::product, stage.spec->outputs, -1);
    layer.a = stage.x;
    layer.depth = static_cast<int32_t>(stage.spec->inputs);
    layer.weight = parameter(stage.numbers.weight);
    layer.bias = parameter(stage.numbers.bias);
    layer.out = stage.z;
    if (!stage.spec->batch_norm) {
      layer.activation = stage.spec->activation;
      return;
    }
    Instruction& moments = add(Op::moments, stage.spec->outputs, -1);
    moments.a = stage.z;
    moments.partials = stage.partials;
  }

  void normalize(Stage& stage) {
    Instruction& made = add(Op::normalize, stage.spec->outputs, -1);
    made.out = stage.z;
    made.other = stage.h;
    made.activation = stage.spec->activation;
    made.weight = parameter(stage.numbers.norm_weight);
    made.bias = parameter(stage.numbers.norm_bias);
    made.statistics = stage.statistics;
  }

  // The gradient of h, synthetic or the criterion's, and of u.
  void gradient(Stage& stage, int32_t s) {
    if (stage.next_input != nullptr) regress(*stage.next_input, itself(stage.h), s + 1);
    if (stage.sent == nullptr) {
      Instruction& criterion = add(Op::criterion, stage.spec->outputs, -1);
      criterion.a = stage.h;
      criterion.out = stage.dz;
      criterion.partials = program_.criterion.partials;
      if (stage.spec->activation != Activation::identity) {
        Instruction& made = add(Op::product, stage.spec->outputs, s);
        made.finish = Finish::differentiate;
        made.a = made.out = stage.dz;
        made.activation = stage.spec->activation;
        made.other = stage.h;
      }
    }
    if (!stage.spec->batch_norm) return;
    Instruction& moments = add(Op::gradient_moments, stage.spec->outputs, s);
    moments.a = stage.dz;
    moments.other = stage.z;
    moments.partials = stage.partials;
  }

  void propagate(size_t s) {
    Stage& stage = stages_[s];
    const auto number = static_cast<int32_t>(s);
    if (stage.spec->batch_norm) {
      Instruction& made = add(Op::normalize_gradient, stage.spec->outputs, number);
      made.out = stage.dz;
      made.other = stage.z;
      made.weight = parameter(stage.numbers.norm_weight);
      made.statistics = stage.statistics;
    }
    if (s > 0) {
      regress(*stages_[s - 1].regressed, delta(stage), number);
    } else if (spec_.input_gradient) {
      Instruction made = delta(stage);
      made.columns = static_cast<int32_t>(stage.spec->inputs);
      made.stage = number;
      made.out = {Place::input_gradient, 0};
      program_.instructions.push_back(made);
    }
  }

  void build() {
    make_stages();
    const bool unlocked = spec_.unlocked();
    const Operand network_input{spec_.separate_input ? Place::network_input : Place::x, 0};
    const Operand output{Place::output, 0};
    // What the update reads must be the plan's own: by then the caller may have written over it.
    const bool goes_on = spec_.criterion == Criterion::none;
    const size_t top = stages_.size() - 1;
    program_.criterion.partials = allocate(program_.row_blocks).at;
    program_.criterion.count = program_.row_blocks;
    if (spec_.criterion == Criterion::cross_entropy && spec_.batch > kCountedLabels) {
      program_.label_counts = allocate((spec_.batch + kCountedLabels - 1) / kCountedLabels).at;
    }

    begin();
    for (size_t s = 0; s <= top; ++s) {
      Stage& stage = stages_[s];
      const int64_t outputs = stage.spec->outputs;
      if (stage.i != nullptr) stage.next_input = evaluate(stage.i, network_input, true);
      stage.x = s == 0     ? Operand{Place::x, 0}
                : unlocked ? stages_[s - 1].next_input->prediction
                           : stages_[s - 1].h;
      stage.h = s == top && !goes_on ? output : matrix(outputs);
      stage.z = stage.spec->batch_norm ? matrix(outputs) : stage.h;
      stage.dz = matrix(outputs);
      Job job;
      job.grad = stage.dz;
      job.input = stage.x;
      job.outputs = static_cast<int32_t>(outputs);
      job.inputs = static_cast<int32_t>(stage.spec->inputs);
      job.weight = stage.numbers.weight;
      job.bias = stage.numbers.bias;
      job.stage = static_cast<int32_t>(s);
      program_.jobs.push_back(job);
      if (!stage.spec->batch_norm) continue;
      stage.statistics = allocate(4 * outputs).at;
      stage.partials = allocate(2 * program_.row_blocks * outputs).at;
      if (stage.numbers.norm_weight < 0) continue;
      job = Job{};
      job.outputs = static_cast<int32_t>(outputs);
      job.inputs = 1;
      job.stage = static_cast<int32_t>(s);
      job.weight = stage.numbers.norm_weight;
      job.ready = {Place::workspace, stage.statistics + 3 * outputs};
      program_.jobs.push_back(job);
      job.weight = stage.numbers.norm_bias;
      job.ready = {Place::workspace, stage.statistics + 2 * outputs};
      program_.jobs.push_back(job);
    }

    // A stage whose dz waits for sums over the batch is finished after the next wait for all rows,
    // which the next stage's statistics need anyway.
    std::vector<size_t> waiting;
    const auto propagate_waiting = [&] {
      for (size_t s : waiting) reduce(stages_[s], s, true);
      for (size_t s : waiting) propagate(s);
      waiting.clear();
    };
    for (size_t s = 0; s <= top; ++s) {
      Stage& stage = stages_[s];
      linear(stage);
      if (stage.spec->batch_norm) {
        end(program_.forward);
        reduce(stage, s, false);
        propagate_waiting();
        normalize(stage);
      }
      if (stage.m != nullptr) {
        stage.sent = evaluate(stage.m, stage.h, !unlocked, &stage);
        stage.regressed =
            unlocked ? evaluate(stage.m, stage.next_input->prediction, true) : stage.sent;
      }
      gradient(stage, static_cast<int32_t>(s));
      if (stage.spec->batch_norm) {
        waiting.push_back(s);
      } else {
        propagate(s);
      }
    }
    if (!waiting.empty()) {
      end(program_.forward);
      propagate_waiting();
    }
    if (goes_on) {
      Instruction copy = itself(unlocked ? stages_[top].next_input->prediction : stages_[top].h);
      copy.columns = static_cast<int32_t>(stages_[top].spec->outputs);
      copy.out = output;
      program_.instructions.push_back(copy);
    }
    end(program_.forward);
    if (stages_[top].m != nullptr) {
      regress(*stages_[top].regressed, itself({Place::gradient, 0}),
              static_cast<int32_t>(stages_.size()));
      end(program_.regression);
    }

    const auto add_loss = [&](const Evaluation& evaluation) {
      const Synthesizer& of = *evaluation.synthesizer;
      program_.synthesis.push_back(
          {of.stage, evaluation.partials, program_.row_blocks * column_tiles(of.widths.back())});
    };
    for (const Stage& stage : stages_) {
      if (stage.regressed != nullptr) add_loss(*stage.regressed);
    }
    for (const Stage& stage : stages_) {
      if (stage.next_input != nullptr) add_loss(*stage.next_input);
    }
  }

  void divide_sums() {
    if (spec_.batch <= kSummedRows) return;
    program_.summed_pieces = (spec_.batch + kSummedRows - 1) / kSummedRows;
    for (Job& job : program_.jobs) {
      if (job.bias >= 0) job.sums = allocate(program_.summed_pieces * job.outputs);
    }
  }

  const NetworkSpec& spec_;
  SweepProgram program_;
  Segment open_;
  // Deques: what points into them stays valid.
  std::deque<Synthesizer> synthesizers_;
  std::deque<Evaluation> evaluations_;
  std::deque<Stage> stages_;
};

// Products of `library_from` multiply-adds and more are left to torch's library.
inline SweepProgram make_sweep_program(const NetworkSpec& spec, int64_t library_from) {
  SweepProgram program = SweepProgramBuilder(spec).take();
  arrange_phases(program);
  LibraryProducts(program, spec.batch, library_from).hand_over();
  count_phases(program);
  return program;
}

}  // namespace fastdni::cuda
