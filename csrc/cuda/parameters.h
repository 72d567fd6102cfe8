// Parameters, checked, as the kernels are told of them.
#pragma once
#include <cmath>

#include "cuda/kernels/sweep.h"
#include "ops/optimizer_binding.h"

namespace fastdni::cuda {

// Whether some of a parameter's numbers are the GPU's own: its update is worked out there.
template <class T>
bool is_prepared_there(const SweepParameter<T>& parameter) {
  return parameter.step.at != nullptr || parameter.lr.at != nullptr;
}

template <class T>
SweepParameter<T> parameter_of(const ParameterMemory& from) {
  SweepParameter<T> to{};
  to.value = static_cast<T*>(from.value);
  to.first = static_cast<T*>(from.first);
  to.second = static_cast<T*>(from.second);
  to.step = from.device_step;
  to.lr = from.device_lr;
  if (!is_prepared_there(to)) {
    to.update = prepared<T>(from.settings, from.step,
                            [](double beta, double n) { return std::pow(beta, n); });
    return to;
  }
  // The rule, that there is something to do; the rest is worked out there.
  to.update.rule = from.settings.rule;
  to.settings = from.settings;
  if (from.device_lr.at != nullptr) to.settings.lr = 0;  // NaN would equal nothing
  to.count = from.step;
  return to;
}

// A count of the CPU's would be that of the capture in every replay.
inline void check_count_in_graph(const char* op, const ParameterMemory& parameter) {
  const Rule rule = parameter.settings.rule;
  const bool counted = rule == Rule::adam || rule == Rule::adamw;
  FASTDNI_CHECK(!counted || parameter.device_step.at != nullptr, op,
                ": in a CUDA graph an optimizer's step count must be on the GPU: make it with "
                "capturable=True");
}

}  // namespace fastdni::cuda
