// Optimizers as an op is given them, for any op that updates parameters: who updates which
// parameter, by what numbers, and the memory that is kept for it.
#pragma once
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/optimizer.h"
#include "ops/tensor.h"

namespace fastdni {

using Integers = std::vector<int64_t>;

// The memory of one parameter.
struct ParameterMemory {
  void* value = nullptr;
  void* first = nullptr;
  void* second = nullptr;
  OptimizerSettings settings;
  double step = 0;  // Adam's, this one included
  // Those that are on the GPU instead; Adam's step not yet raised.
  DeviceNumber device_step, device_lr;
};

// The dtype and the device that an op works in, and whose they are: "the plan is", say.
struct Placement {
  ScalarType dtype;
  std::optional<int32_t> gpu;  // its number; none: the CPU
  const char* as;
};
Placement placement_of(const Tensor& tensor, const char* as);

bool is_placed(const Tensor& tensor, const Placement& placement);

void check_device(const std::string& caller, const char* name, const Tensor& tensor,
                  const Placement& placement);

// How what an optimizer keeps may lie in memory: anyhow, by way of copies, or one element after the
// other.
enum class Layout { any, contiguous };

// What is left to do once everything is checked, and what is held until it is done.
class OptimizerBinding {
 public:
  explicit OptimizerBinding(size_t parameters = 0) { steps_.reserve(parameters); }

  // A tensor's memory, or that of a copy where its elements do not follow one another.
  void* memory_of(const Tensor& tensor);
  // A step count on the CPU.
  void count(const Tensor& step) { steps_.push_back(&step); }

  void raise_steps() const;
  // Called after the update: brings what was written in copies to where it belongs.
  void write_back();

 private:
  std::vector<const Tensor*> steps_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
};

// Takes each parameter's state in the order of `state`: p.grad, or momentum_buffer, or exp_avg,
// exp_avg_sq, step; then its learning rate, where `settings` has NaN for it. `groups` has for each
// parameter its row of `settings`: rule, lr, weight_decay, a, b, eps, nesterov
// (common/optimizer.h).
OptimizerBinding bind_optimizer(const std::string& caller, const Placement& placement,
                                Layout layout, const std::vector<Shape>& shapes,
                                const Tensors& state, const Integers& groups,
                                const std::vector<double>& settings,
                                std::vector<ParameterMemory>& parameters);

}  // namespace fastdni
