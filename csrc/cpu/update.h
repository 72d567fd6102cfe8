// Updates of parameters from gradients that lie in memory.
#pragma once
#include <cmath>

#include "cpu/kernels/sweep.h"
#include "ops/optimizer_binding.h"

namespace fastdni::cpu {

template <class T>
void update_parameter(const ParameterMemory& memory, const Tensor& gradient) {
  const auto rule = prepared<accumulate_t<T>>(
      memory.settings, memory.step, [](double beta, double n) { return std::pow(beta, n); });
  if (rule.rule == Rule::none) return;
  constexpr int64_t kElementsPerTask = 16384;  // worth waking a thread for
  const T* grad = data<T>(gradient);
  // Any memory stands for what the rule does not look at.
  void* any = memory.value == nullptr ? memory.first : memory.value;
  const auto at = [any](void* begin, int64_t i) {
    return static_cast<T*>(begin == nullptr ? any : begin) + i;
  };
  with_isa([&](auto isa) {
    torch::stable::parallel_for(
        0, gradient.numel(), kElementsPerTask, [&](int64_t first, int64_t last) {
          update<isa.value, T>(rule, grad + first, at(memory.value, first), at(memory.first, first),
                               at(memory.second, first), last - first);
        });
  });
}

// All of them, of one dtype.
inline void update_parameters(OptimizerBinding& optimizer,
                              const std::vector<ParameterMemory>& memory,
                              const Tensors& gradients) {
  optimizer.raise_steps();
  with_dtype(gradients[0].scalar_type(), [&](auto scalar) {
    for (size_t i = 0; i < memory.size(); ++i) {
      update_parameter<decltype(scalar)>(memory[i], gradients[i]);
    }
  });
  optimizer.write_back();
}

}  // namespace fastdni::cpu
