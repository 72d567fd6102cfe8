#include "ops/sweep_plan.h"

#include <algorithm>
#include <array>
#include <map>
#include <mutex>

namespace fastdni {
namespace {

// Widths that do not fit together would be read out of bounds.
void check_spec(const NetworkSpec& spec) {
  FASTDNI_CHECK(!spec.stages.empty() && spec.batch > 0,
                "sweep: a plan must have at least one stage and one row");
  FASTDNI_CHECK(!spec.separate_input || spec.unlocked(),
                "sweep: a separate input is for complete unlock");
  for (size_t s = 0; s < spec.stages.size(); ++s) {
    const StageSpec& stage = spec.stages[s];
    const bool top = s + 1 == spec.stages.size();
    const SynthesizerSpec& m = stage.synthesizer;
    const SynthesizerSpec& i = stage.input_synthesizer;
    FASTDNI_CHECK(s == 0 || stage.inputs == spec.stages[s - 1].outputs, "sweep: stage ", s,
                  " must take what the one below gives: ", spec.stages[s - 1].outputs, ", got ",
                  stage.inputs);
    FASTDNI_CHECK(m.present() == !(top && spec.criterion != Criterion::none), "sweep: stage ", s,
                  " must have a synthesizer above it, the one with the criterion none");
    FASTDNI_CHECK(!m.present() || (m.widths.front() == stage.outputs &&
                                   m.widths.back() == stage.outputs && m.widths.size() > 1),
                  "sweep: the synthesizer of stage ", s, " must map its output to its gradient");
    FASTDNI_CHECK(i.present() == (m.present() && spec.unlocked()), "sweep: stage ", s,
                  " must have an input synthesizer as every boundary, or as none");
    const int64_t input = spec.separate_input ? spec.stages[0].input_synthesizer.widths.front()
                                              : spec.stages[0].inputs;
    FASTDNI_CHECK(
        !i.present() ||
            (i.widths.front() == input && i.widths.back() == stage.outputs && i.widths.size() > 1),
        "sweep: the input synthesizer of stage ", s, " must map the network's input to its output");
  }
}

// By device. A function's, so that it is there before any backend registers.
std::array<MakeSweep, 2>& sweep_makers() {
  static std::array<MakeSweep, 2> makers{};
  return makers;
}

std::mutex mutex;
std::map<int64_t, std::shared_ptr<Plan>> plans;
int64_t next_handle = 1;

}  // namespace

Plan::Plan(NetworkSpec network, ScalarType dtype, std::optional<int32_t> gpu,
           std::unique_ptr<Sweep> sweep)
    : spec(std::move(network)), dtype(dtype), gpu(gpu), expected(spec), sweep(std::move(sweep)) {
  memory.parameters.resize(expected.parameters.size());
  memory.statistics.resize(expected.statistics.size());
  memory.active.resize(spec.stages.size() + 1);
  const auto bytes = [&](const Shape& shape) {
    int64_t count = dtype == ScalarType::Double ? 8 : 4;
    for (int64_t n : shape) count *= n;
    return count;
  };
  for (const Shape& shape : expected.parameters) parameter_bytes.push_back(bytes(shape));
  for (const Shape& shape : expected.statistics) statistic_bytes.push_back(bytes(shape));
}

SweepBackend::SweepBackend(Device device, MakeSweep make) {
  sweep_makers()[static_cast<size_t>(device)] = make;
}

std::shared_ptr<Plan> make_plan(NetworkSpec spec, ScalarType dtype, std::optional<int32_t> gpu,
                                bool runs) {
  check_spec(spec);
  std::unique_ptr<Sweep> sweep;
  if (runs) {
    const auto drops = [](const StageSpec& stage) { return stage.dropout; };
    FASTDNI_CHECK(!gpu || std::none_of(spec.stages.begin(), spec.stages.end(), drops),
                  "sweep: a GPU's plan must have no stage with Dropout");
    const MakeSweep make = sweep_makers()[static_cast<size_t>(gpu ? Device::gpu : Device::cpu)];
    FASTDNI_CHECK(make != nullptr, "sweep: this build has no kernels for a ", gpu ? "GPU" : "CPU");
    sweep = make(spec, dtype);
  }
  return std::make_shared<Plan>(std::move(spec), dtype, gpu, std::move(sweep));
}

int64_t register_plan(std::shared_ptr<Plan> plan) {
  const std::lock_guard<std::mutex> lock(mutex);
  plans[next_handle] = std::move(plan);
  return next_handle++;
}

void forget_plan(int64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  plans.erase(handle);
}

std::shared_ptr<Plan> find_plan(int64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(handle);
  FASTDNI_CHECK(found != plans.end(), "sweep: plan must be the handle of a live plan, got ",
                handle);
  return found->second;
}

}  // namespace fastdni
