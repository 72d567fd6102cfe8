// What a sweep runs over: the stages, their synthesizers, the batch. A plan owns the memory that
// the step needs besides its arguments, so that a step allocates nothing but its results.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "common/network.h"
#include "common/parameters.h"
#include "ops/optimizer_binding.h"
#include "ops/tensor.h"

namespace fastdni {

// What one step is given, checked. Null where there is none.
struct StepMemory {
  const void* x = nullptr;              // (batch, inputs)
  const void* network_input = nullptr;  // (batch, K) what I predicts from, where that is not x
  const void* target = nullptr;         // (batch,) int64 or (batch, outputs)
  const void* context = nullptr;        // (batch, C); without one the labels, as one-hot vectors
  std::vector<const void*> noise;       // (batch, outputs) of each stage with Dropout
  std::vector<ParameterMemory> parameters;
  std::vector<void*> statistics;
  std::vector<bool> active;  // by stage
  // (batch, outputs): of the topmost stage; in complete unlock with more stages above what they get
  // in its place
  void* output = nullptr;
  void* loss = nullptr;            // ()
  bool apart = false;              // `forward` and `update` are ops of their own
  void* synthesis_loss = nullptr;  // (synthesizers,), gradients' before inputs'
  void* input_gradient = nullptr;  // (batch, inputs)
  const void* gradient = nullptr;  // (batch, outputs), what came back from the stage above
  const Tensor* like = nullptr;    // a tensor of the device and dtype
};

// Runs steps of one plan: the memory, and the program of passes over it.
class Sweep {
 public:
  virtual ~Sweep() = default;
  // F, S and D of every stage.
  virtual void forward(const StepMemory& memory) = 0;
  // What is left: the regression of the topmost synthesizer on `gradient`, and U of every stage.
  virtual void update(const StepMemory& memory) = 0;
  virtual int64_t workspace_bytes() const = 0;
  // How a GPU's launches divide the step; empty on the CPU.
  virtual std::string launches() const { return ""; }
};

// Makes the sweeps of one kind of device. A backend registers its own when it is loaded, as it does
// its ops: `const SweepBackend backend(Device::cpu, &make_sweep);` in its driver.
enum class Device { cpu, gpu };
using MakeSweep = std::unique_ptr<Sweep> (*)(const NetworkSpec& spec, ScalarType dtype);
struct SweepBackend {
  SweepBackend(Device device, MakeSweep make);
};

// The last step of a whole network, where it may be repeated: what it was given besides its data
// and the optimizers' numbers. Whoever repeats it keeps the tensors.
struct LastStep {
  bool known = false;
  bool bound = false;  // its parameters and statistics are, checked, for one repetition
  Borrowed parameters, statistics, state;
  std::vector<int64_t> groups;
  std::vector<int64_t> active;
};

struct Plan {
  // Held for the length of an op: `memory` and the sweep serve one step at a time.
  std::mutex in_use;
  NetworkSpec spec;
  ScalarType dtype;
  std::optional<int32_t> gpu;  // its number; none: the CPU
  Signature expected;
  std::unique_ptr<Sweep> sweep;  // none: the plan has rules alone, and others run its steps
  StepMemory memory;             // filled at each step; here to keep its allocations
  std::vector<int64_t> parameter_bytes, statistic_bytes;
  LastStep last;
  int64_t steps = 0;         // whole steps that were taken
  bool goes_on = false;      // a forward part waits for its update
  std::vector<Tensor> held;  // what an update reads of the last forward pass's arguments

  Plan(NetworkSpec network, ScalarType dtype, std::optional<int32_t> gpu,
       std::unique_ptr<Sweep> sweep);
};

// Plans are handed to the ops by number.
int64_t register_plan(std::shared_ptr<Plan> plan);
void forget_plan(int64_t handle);
std::shared_ptr<Plan> find_plan(int64_t handle);

// `runs`: whether the plan has what runs a step, or rules alone.
std::shared_ptr<Plan> make_plan(NetworkSpec spec, ScalarType dtype, std::optional<int32_t> gpu,
                                bool runs);

}  // namespace fastdni
