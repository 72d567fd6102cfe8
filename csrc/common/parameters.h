// The order of a network's parameters, for the plan, every backend and Python alike: for each stage
// its weight, [bias], [BatchNorm's weight, bias], then those of M and of I: weights, [biases], [Q,
// [q]].
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "common/network.h"

namespace fastdni {

// The number of a parameter that there is not.
constexpr int32_t kNone = -1;

// Numbers of a synthesizer's parameters; of its biases kNone where it has none.
struct SynthesizerParameters {
  std::vector<int32_t> weights, biases;
  int32_t context_weight = kNone, context_bias = kNone;
};

// Numbers of a stage's parameters, and of its running mean among the statistics, which the running
// variance and the number of batches follow.
struct StageParameters {
  int32_t weight = kNone, bias = kNone, norm_weight = kNone, norm_bias = kNone;
  int32_t running = kNone;
  SynthesizerParameters synthesizer, input_synthesizer;
};

// What a step is given, in its order.
struct Signature {
  using Shape = std::vector<int64_t>;

  std::vector<StageParameters> stages;
  std::vector<Shape> parameters;
  std::vector<int64_t> parameter_stages;  // a synthesizer belongs to the stage above its boundary
  std::vector<Shape> statistics;          // running_mean, running_var, num_batches_tracked

  explicit Signature(const NetworkSpec& spec) {
    for (const StageSpec& stage : spec.stages) {
      const auto s = static_cast<int64_t>(stages.size());
      StageParameters& numbers = stages.emplace_back();
      numbers.weight = add(s, {stage.outputs, stage.inputs});
      if (stage.bias) numbers.bias = add(s, {stage.outputs});
      if (stage.batch_norm && stage.affine) {
        numbers.norm_weight = add(s, {stage.outputs});
        numbers.norm_bias = add(s, {stage.outputs});
      }
      if (stage.batch_norm && stage.running) {
        numbers.running = static_cast<int32_t>(statistics.size());
        for (const Shape& shape : {Shape{stage.outputs}, Shape{stage.outputs}, Shape{}}) {
          statistics.push_back(shape);
        }
      }
      numbers.synthesizer = add(s + 1, stage.synthesizer);
      numbers.input_synthesizer = add(s + 1, stage.input_synthesizer);
    }
  }

 private:
  int32_t add(int64_t stage, Shape shape) {
    parameters.push_back(std::move(shape));
    parameter_stages.push_back(stage);
    return static_cast<int32_t>(parameters.size()) - 1;
  }

  SynthesizerParameters add(int64_t stage, const SynthesizerSpec& spec) {
    SynthesizerParameters numbers;
    for (size_t i = 1; i < spec.widths.size(); ++i) {
      numbers.weights.push_back(add(stage, {spec.widths[i], spec.widths[i - 1]}));
    }
    for (size_t i = 1; i < spec.widths.size(); ++i) {
      numbers.biases.push_back(spec.bias ? add(stage, Shape{spec.widths[i]}) : kNone);
    }
    if (spec.context > 0) {
      numbers.context_weight = add(stage, {spec.widths[1], spec.context});
      if (spec.bias) numbers.context_bias = add(stage, Shape{spec.widths[1]});
    }
    return numbers;
  }
};

}  // namespace fastdni
