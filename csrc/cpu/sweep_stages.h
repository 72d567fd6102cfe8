// What a CPU sweep works on: the stages and synthesizers with the memory of their activations and
// gradients, and what a step is given.
#pragma once
#include <deque>
#include <vector>

#include "cpu/sweep_memory.h"
#include "ops/sweep_plan.h"

namespace fastdni::cpu {

// A weight (outputs, inputs) in panels: of its transpose for x W^T, of itself for dz W.
template <class T>
struct Weight {
  int32_t parameter = kNone;
  int64_t outputs = 0, inputs = 0;
  T* forward = nullptr;
  T* backward = nullptr;
};

template <class T>
struct Synthesizer {
  std::vector<Weight<T>> weights;
  std::vector<int32_t> biases;
  Weight<T> context_weight;
  int32_t context_bias = kNone;
  Activations<T>* context = nullptr;
  size_t stage = 0;  // the one above its boundary, whose mask it shares
};

// A synthesizer at one trigger. `grads` are those of its layers' outputs; the last holds the
// target first, then (2 / B) e.
template <class T>
struct Evaluation {
  Synthesizer<T>* synthesizer = nullptr;
  Activations<T>* trigger = nullptr;
  std::vector<Activations<T>*> hidden;
  Activations<T>* prediction = nullptr;
  std::vector<Matrix<T>> grads;
  std::vector<double> squares;  // by block
};

template <class T>
struct Stage {
  StageSpec spec;
  Weight<T> weight;
  StageParameters numbers;
  Activations<T>* x = nullptr;
  Activations<T>* h = nullptr;
  Matrix<T> phi;          // phi(u); without Dropout the same as h
  int32_t noise = kNone;  // of Dropout: its number among the step's
  Matrix<T> z;            // with BatchNorm, normalised; without, the same as phi
  Matrix<T> dz;           // the gradient of h, of u and of z, one after the other
  T* mean = nullptr;
  T* inverse = nullptr;
  T* block_sums = nullptr;              // (blocks, outputs): means, then sums of du
  T* block_dots = nullptr;              // (blocks, outputs): squares, then sums of du * z
  T* sums = nullptr;                    // (outputs,): BatchNorm's bias gradient
  T* dots = nullptr;                    // (outputs,): BatchNorm's weight gradient
  Evaluation<T>* sent = nullptr;        // M at h
  Evaluation<T>* next_input = nullptr;  // I at x, in complete unlock
};

template <class T>
struct CpuNetwork {
  NetworkSpec spec;
  int64_t batch = 0, blocks = 0;
  bool bfloat16 = false;
  // Deques: what points into them stays valid.
  std::deque<Synthesizer<T>> synthesizers;
  std::deque<Evaluation<T>> evaluations;
  std::deque<Stage<T>> stages;
  std::vector<Evaluation<T>*> regressions;  // of M, by boundary
  Matrix<T> input_gradient;
  std::vector<double> criterion_sums;  // by block

  // Of the step at work.
  const StepMemory* memory = nullptr;
  std::vector<T*> values;  // of the parameters
  int64_t counted = 0;     // rows that the criterion counts

  Rows block(int64_t b) const { return {batch * b / blocks, batch * (b + 1) / blocks}; }
  const T* value(int32_t parameter) const {
    return parameter == kNone ? nullptr : values[parameter];
  }
  // Whether a stage is updated in this step.
  bool active(size_t stage) const { return memory->active[stage]; }
};

}  // namespace fastdni::cpu
