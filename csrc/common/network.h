// What a network is made of, for every backend.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "common/activation.h"

namespace fastdni {

// A BasicSynthesizer: widths K, H, ..., N. No context: 0.
struct SynthesizerSpec {
  std::vector<int64_t> widths;
  bool bias = true;
  int64_t context = 0;

  bool present() const { return !widths.empty(); }
};

// Linear [BatchNorm1d] [activation] [Dropout], the synthesizer M of the gradient of its output, and
// in complete unlock the synthesizer I of the output itself.
struct StageSpec {
  int64_t inputs = 0, outputs = 0;
  bool bias = true;
  bool batch_norm = false, affine = true, running = true;
  double momentum = 0.1;  // negative: the running statistics are plain averages
  double eps = 1e-5;
  Activation activation = Activation::identity;
  bool dropout = false;  // h is multiplied by noise that each step is given
  SynthesizerSpec synthesizer, input_synthesizer;
};

enum class Criterion { none, cross_entropy, mse };

// A label of rows that cross_entropy leaves out.
constexpr int64_t kIgnoreIndex = -100;

// The precision of products of float32; sums and all else are float32 whatever it is. The CPU has
// tensor cores for none of it: there tf32 and tf32x3 are exact.
enum class Precision {
  exact,
  tf32,      // operands rounded to 10 bits of mantissa
  tf32x3,    // three of those products, of the operands' upper and lower parts: nearly float32
  bfloat16,  // operands rounded to bfloat16
};

// Consecutive stages of a network.
struct NetworkSpec {
  std::vector<StageSpec> stages;
  int64_t batch = 0;
  Criterion criterion = Criterion::none;  // none: the network goes on above the last stage
  bool input_gradient = false;            // delta of the first stage's input is wanted
  Precision precision = Precision::exact;

  bool separate_input = false;  // I predicts from another tensor than the first stage's x

  bool unlocked() const { return stages[0].input_synthesizer.present(); }
};

}  // namespace fastdni
