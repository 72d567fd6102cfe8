// sweep: one training step of consecutive decoupled stages, `Linear [BatchNorm1d] [activation]
// [Dropout]` with their synthesizers. The equations are in fastdni/reference/sweep.py.
//
//   sweep_           the whole step of a whole network
//   sweep_repeat_    the same step as the last one with other data and other numbers: the same
//                    parameters, statistics and state are taken, and written, without being passed
//                    again. Its schema does not name them: not for those who trace
//   sweep_forward_   F, S and D of a part of a network: what comes before the gradient from above
//   sweep_update_    the rest: the topmost synthesizer's regression, and every update
//   sweep_check_...  what the two parts may be given: the same rules for every backend
#include "ops/sweep.h"

#include <optional>

#include "ops/range.h"
#include "ops/sweep_binding.h"
#include "ops/sweep_plan.h"

namespace fastdni {
namespace {

// `runs`: whether the plan is one that runs steps, or of rules alone.
std::shared_ptr<Plan> find_plan(const std::string& caller, int64_t handle, bool runs) {
  std::shared_ptr<Plan> plan = fastdni::find_plan(handle);
  FASTDNI_CHECK((plan->sweep != nullptr) == runs, caller, ": plan must be one ",
                runs ? "that runs steps, got rules alone" : "of rules alone, got one that runs");
  return plan;
}

// The results of a step, fresh.
Tensor make_output(Plan& plan, const Tensor& like) {
  Tensor output = empty(like, {plan.spec.batch, plan.spec.stages.back().outputs});
  plan.memory.output = output.data_ptr();
  return output;
}

Tensor make_loss(Plan& plan, const Tensor& like) {
  Tensor loss = empty(like, {});
  plan.memory.loss = loss.data_ptr();
  return loss;
}

Tensor make_synthesis_loss(Plan& plan, const Tensor& like) {
  int64_t boundaries = 0;
  for (const StageSpec& stage : plan.spec.stages) boundaries += stage.synthesizer.present();
  Tensor loss = plan.spec.unlocked() ? empty(like, {2, boundaries}) : empty(like, {boundaries});
  plan.memory.synthesis_loss = loss.data_ptr();
  return loss;
}

void run_forward(Plan& plan) {
  const Range range("fastdni::sweep forward, synthesize, propagate");
  plan.sweep->forward(plan.memory);
}

void run_update(Plan& plan, OptimizerBinding& optimizer) {
  const Range range("fastdni::sweep weight gradients and updates");
  optimizer.raise_steps();
  plan.sweep->update(plan.memory);
  optimizer.write_back();
}

// All of it, once data, parameters and statistics are bound.
std::tuple<Tensor, Tensor, Tensor> whole_step(const std::string& caller, Plan& plan,
                                              const Tensor& x, SweepInputs inputs,
                                              const Tensors& state, const Integers& groups,
                                              const std::vector<double>& settings) {
  OptimizerBinding optimizer = bind_optimizer(caller, plan, state, groups, settings);
  keep_apart(plan, inputs);
  plan.goes_on = false;
  plan.memory.like = &x;
  Tensor output = make_output(plan, x), loss = make_loss(plan, x);
  Tensor synthesis_loss = make_synthesis_loss(plan, x);
  plan.memory.gradient = nullptr;

  plan.memory.apart = false;
  run_forward(plan);
  run_update(plan, optimizer);
  ++plan.steps;
  return {output, loss, synthesis_loss};
}

std::tuple<Tensor, Tensor, Tensor> sweep_step(int64_t handle, const std::string& caller,
                                              const Tensor& x, const OptionalTensor& target,
                                              const OptionalTensor& context, const Tensors& noise,
                                              const Tensors& parameters, const Tensors& statistics,
                                              const Tensors& state, const Integers& groups,
                                              const std::vector<double>& settings,
                                              const Integers& active, bool repeatable) {
  const std::shared_ptr<Plan> plan = find_plan(caller, handle, true);
  const std::lock_guard<std::mutex> lock(plan->in_use);
  LastStep& last = plan->last;
  last.known = false;
  FASTDNI_CHECK(plan->spec.criterion != Criterion::none && !plan->spec.separate_input &&
                    !plan->spec.input_gradient,
                caller, ": plan must be one of a whole network");
  auto results = whole_step(
      caller, *plan, x,
      bind_forward(caller, *plan, x, target, context, {}, noise, parameters, statistics, active),
      state, groups, settings);
  if (repeatable) {
    last.parameters.borrow(parameters);
    last.statistics.borrow(statistics);
    last.state.borrow(state);
    last.groups = groups;
    last.active = active;
    last.known = true;
  }
  return results;
}

std::tuple<Tensor, Tensor, Tensor> sweep_repeat(int64_t handle, const std::string& caller,
                                                const Tensor& x, const OptionalTensor& target,
                                                const OptionalTensor& context, const Tensors& noise,
                                                const std::vector<double>& settings) {
  const std::shared_ptr<Plan> plan = find_plan(caller, handle, true);
  const std::lock_guard<std::mutex> lock(plan->in_use);
  LastStep& last = plan->last;
  FASTDNI_CHECK(last.bound || can_be_repeated(*plan), caller,
                ": plan has no step to repeat, or its tensors are not such as they were");
  last.bound = false;
  return whole_step(caller, *plan, x, bind_data(caller, *plan, x, target, context, noise),
                    last.state.tensors(), last.groups, settings);
}

std::tuple<Tensor, Tensor, Tensor> sweep_forward(
    int64_t handle, const std::string& caller, const Tensor& x, const OptionalTensor& target,
    const OptionalTensor& context, const OptionalTensor& network_input, const Tensors& noise,
    const Tensors& parameters, const Tensors& statistics, const Integers& active) {
  const std::shared_ptr<Plan> plan = find_plan(caller, handle, true);
  const std::lock_guard<std::mutex> lock(plan->in_use);
  plan->goes_on = false;
  const SweepInputs inputs = bind_forward(caller, *plan, x, target, context, network_input, noise,
                                          parameters, statistics, active);
  plan->memory.like = &x;
  Tensor output = make_output(*plan, x), loss = make_loss(*plan, x);
  Tensor input_gradient = empty(x, plan->spec.input_gradient ? shape_of(x) : Shape{0});
  plan->memory.input_gradient = input_gradient.data_ptr();
  plan->held = {inputs.x};
  for (const OptionalTensor& given : {inputs.target, inputs.context, inputs.network_input}) {
    if (given.has_value()) plan->held.push_back(*given);
  }
  plan->memory.apart = true;
  run_forward(*plan);
  plan->goes_on = true;
  return {output, loss, input_gradient};
}

Tensor sweep_update(int64_t handle, const std::string& caller, const OptionalTensor& gradient,
                    const Tensors& parameters, const Tensors& state, const Integers& groups,
                    const std::vector<double>& settings, const Integers& active) {
  const std::shared_ptr<Plan> plan = find_plan(caller, handle, true);
  const std::lock_guard<std::mutex> lock(plan->in_use);
  OptionalTensor arrived;
  OptimizerBinding optimizer =
      bind_update(caller, *plan, gradient, parameters, state, groups, settings, active, arrived);
  plan->memory.like = &parameters[0];
  Tensor synthesis_loss = make_synthesis_loss(*plan, parameters[0]);
  run_update(*plan, optimizer);
  plan->held.clear();
  return synthesis_loss;
}

// The rules of both parts, for those who run a plan's steps themselves.
void check_forward(int64_t handle, const std::string& caller, const Tensor& x,
                   const OptionalTensor& target, const OptionalTensor& context,
                   const OptionalTensor& network_input, const Tensors& noise,
                   const Tensors& parameters, const Tensors& statistics, const Integers& active) {
  const std::shared_ptr<Plan> plan = find_plan(caller, handle, false);
  const std::lock_guard<std::mutex> lock(plan->in_use);
  plan->goes_on = false;
  bind_forward(caller, *plan, x, target, context, network_input, noise, parameters, statistics,
               active);
  plan->goes_on = true;
}

void check_update(int64_t handle, const std::string& caller, const OptionalTensor& gradient,
                  const Tensors& parameters, const Tensors& state, const Integers& groups,
                  const std::vector<double>& settings, const Integers& active) {
  const std::shared_ptr<Plan> plan = find_plan(caller, handle, false);
  const std::lock_guard<std::mutex> lock(plan->in_use);
  OptionalTensor arrived;
  bind_update(caller, *plan, gradient, parameters, state, groups, settings, active, arrived);
  plan->goes_on = false;  // whoever asks lets go of what his forward part made
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdni, m) {
  m.def(
      "sweep_(int plan, str caller, Tensor x, Tensor? target, Tensor? context, Tensor[] noise, "
      "Tensor(a!)[] parameters, Tensor(b!)[] statistics, Tensor(c!)[] state, int[] groups, "
      "float[] settings, int[] active, bool repeatable) -> "
      "(Tensor output, Tensor loss, Tensor synthesis_loss)");
  m.def(
      "sweep_repeat_(int plan, str caller, Tensor x, Tensor? target, Tensor? context, "
      "Tensor[] noise, float[] settings) -> (Tensor output, Tensor loss, Tensor synthesis_loss)");
  m.def(
      "sweep_forward_(int plan, str caller, Tensor x, Tensor? target, Tensor? context, "
      "Tensor? network_input, Tensor[] noise, Tensor[] parameters, Tensor(a!)[] statistics, "
      "int[] active) -> (Tensor output, Tensor loss, Tensor input_gradient)");
  m.def(
      "sweep_update_(int plan, str caller, Tensor? gradient, Tensor(a!)[] parameters, "
      "Tensor(b!)[] state, int[] groups, float[] settings, int[] active) -> Tensor synthesis_loss");
  m.def(
      "sweep_check_forward(int plan, str caller, Tensor x, Tensor? target, Tensor? context, "
      "Tensor? network_input, Tensor[] noise, Tensor[] parameters, Tensor[] statistics, "
      "int[] active) -> ()");
  m.def(
      "sweep_check_update(int plan, str caller, Tensor? gradient, Tensor[] parameters, "
      "Tensor[] state, int[] groups, float[] settings, int[] active) -> ()");
  m.def(
      "sweep_check_target(str caller, Tensor target, int batch, int outputs, str criterion) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdni, CompositeExplicitAutograd, m) {
  m.impl("sweep_check_forward", TORCH_BOX(&check_forward));
  m.impl("sweep_check_update", TORCH_BOX(&check_update));
  m.impl("sweep_check_target", TORCH_BOX(&check_target));
}

void implement_sweep(torch::stable::detail::StableLibrary& m) {
  m.impl("sweep_", TORCH_BOX(&sweep_step));
  m.impl("sweep_repeat_", TORCH_BOX(&sweep_repeat));
  m.impl("sweep_forward_", TORCH_BOX(&sweep_forward));
  m.impl("sweep_update_", TORCH_BOX(&sweep_update));
}

}  // namespace fastdni
