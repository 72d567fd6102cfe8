#include "ops/sweep_binding.h"

#include <algorithm>

#include "common/names.h"

namespace fastdni {
namespace {

Placement placement(const Plan& plan) { return {plan.dtype, plan.gpu, "the plan is"}; }

// The context's width, where all of the plan's synthesizers that take one agree.
void check_context(const std::string& caller, const Plan& plan, const OptionalTensor& context,
                   const Tensor* target) {
  const NetworkSpec& spec = plan.spec;
  for (const StageSpec& stage : spec.stages) {
    for (const SynthesizerSpec* synthesizer : {&stage.synthesizer, &stage.input_synthesizer}) {
      const int64_t width = synthesizer->context;
      if (width == 0) continue;
      const Shape wanted{spec.batch, width};
      if (context.has_value()) {
        FASTDNI_CHECK(shape_of(*context) == wanted, caller,
                      ": context must be (B, C) = ", to_string(wanted), ", got ",
                      to_string(shape_of(*context)));
        FASTDNI_CHECK(context->scalar_type() == plan.dtype, caller,
                      ": context must have x's dtype ", to_string(plan.dtype), ", got ",
                      to_string(context->scalar_type()));
        continue;
      }
      FASTDNI_CHECK(target != nullptr && target->scalar_type() == ScalarType::Long, caller,
                    ": context must be (B, C) = ", to_string(wanted),
                    ", got None, and target holds no labels to make it from");
      FASTDNI_CHECK(shape_of(*target) == Shape{spec.batch}, caller, ": target must be (B,) = (",
                    spec.batch, ",), got ", to_string(shape_of(*target)));
      if (plan.gpu) continue;
      const auto* labels = data<int64_t>(*target);
      for (int64_t r = 0; r < spec.batch; ++r) {
        FASTDNI_CHECK(labels[r] < width, caller, ": context must be given, because the label ",
                      labels[r], " has no place in a one-hot context of width ", width);
      }
    }
  }
}

bool has_values(const Tensor& tensor, const Shape& shape, ScalarType dtype) {
  const auto sizes = tensor.sizes();
  const bool same_shape = std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
  return same_shape && tensor.scalar_type() == dtype && tensor.is_contiguous();
}

// Called for every parameter and state tensor of a step: no allocation unless it fails.
void check_values(const std::string& caller, const char* name, const Tensor& tensor,
                  const Shape& shape, ScalarType dtype, const Plan& plan) {
  FASTDNI_CHECK(has_values(tensor, shape, dtype), caller, ": ", name, " must be a contiguous ",
                to_string(dtype), " tensor of shape ", to_string(shape), ", got ",
                to_string(tensor.scalar_type()), " ", to_string(shape_of(tensor)));
  check_device(caller, name, tensor, placement(plan));
}

SweepInputs check_inputs(const std::string& caller, const Plan& plan, const Tensor& x,
                         const OptionalTensor& target, const OptionalTensor& context) {
  const NetworkSpec& spec = plan.spec;
  const Shape wanted{spec.batch, spec.stages[0].inputs};
  check_device(caller, "x", x, placement(plan));
  if (target.has_value()) check_device(caller, "target", *target, placement(plan));
  if (context.has_value()) check_device(caller, "context", *context, placement(plan));
  FASTDNI_CHECK(shape_of(x) == wanted, caller, ": x must be (B, K) = ", to_string(wanted), ", got ",
                to_string(shape_of(x)));
  FASTDNI_CHECK(x.scalar_type() == plan.dtype, caller, ": x must have the parameters' dtype ",
                to_string(plan.dtype), ", got ", to_string(x.scalar_type()));
  for (const StageSpec& stage : spec.stages) {
    FASTDNI_CHECK(!stage.batch_norm || spec.batch > 1, caller,
                  ": x must have at least 2 rows for BatchNorm in training, got 1");
  }
  SweepInputs inputs{as_contiguous(x), {}, {}, {}};
  if (target.has_value()) inputs.target = as_contiguous(*target);
  if (spec.criterion != Criterion::none) {
    FASTDNI_CHECK(target.has_value(), caller, ": target must be given, got None");
    const bool mse = spec.criterion == Criterion::mse;
    check_target(caller, *inputs.target, spec.batch, spec.stages.back().outputs,
                 mse ? "mse" : "cross_entropy");
    FASTDNI_CHECK(!mse || target->scalar_type() == plan.dtype, caller,
                  ": target must have x's dtype ", to_string(plan.dtype), ", got ",
                  to_string(target->scalar_type()));
  }
  check_context(caller, plan, context, inputs.target ? &*inputs.target : nullptr);
  if (context.has_value()) inputs.context = as_contiguous(*context);
  return inputs;
}

void bind_inputs(Plan& plan, const SweepInputs& inputs) {
  plan.memory.x = inputs.x.data_ptr();
  plan.memory.target = inputs.target ? inputs.target->data_ptr() : nullptr;
  plan.memory.context = inputs.context ? inputs.context->data_ptr() : nullptr;
  plan.memory.network_input = inputs.network_input ? inputs.network_input->data_ptr() : nullptr;
}

void bind_noise(const std::string& caller, Plan& plan, const Tensors& noise) {
  const auto& stages = plan.spec.stages;
  const size_t dropouts = std::count_if(stages.begin(), stages.end(),
                                        [](const StageSpec& stage) { return stage.dropout; });
  FASTDNI_CHECK(noise.size() == dropouts, caller, ": noise must hold ", dropouts,
                " tensors, one for each stage with Dropout, got ", noise.size());
  auto& bound = plan.memory.noise;
  bound.clear();
  for (const StageSpec& stage : stages) {
    if (!stage.dropout) continue;
    const Tensor& drawn = noise[bound.size()];
    check_values(caller, "noise", drawn, {plan.spec.batch, stage.outputs}, plan.dtype, plan);
    bound.push_back(drawn.data_ptr());
  }
}

void bind_active(Plan& plan, const Integers& active) {
  for (size_t s = 0; s < active.size(); ++s) plan.memory.active[s] = active[s] != 0;
}

void bind_parameters(const std::string& caller, Plan& plan, const Tensors& parameters,
                     const Integers& active) {
  const auto& shapes = plan.expected.parameters;
  FASTDNI_CHECK(parameters.size() == shapes.size(), caller, ": parameters must hold ",
                shapes.size(), " tensors, got ", parameters.size());
  plan.last.bound = false;
  for (size_t i = 0; i < shapes.size(); ++i) {
    check_values(caller, "a parameter", parameters[i], shapes[i], plan.dtype, plan);
    plan.memory.parameters[i].value = parameters[i].data_ptr();
  }
  FASTDNI_CHECK(active.size() == plan.memory.active.size(), caller, ": active must hold ",
                plan.memory.active.size(), " values, got ", active.size());
  bind_active(plan, active);
}

void bind_statistics(const std::string& caller, Plan& plan, const Tensors& statistics) {
  const auto& shapes = plan.expected.statistics;
  FASTDNI_CHECK(statistics.size() == shapes.size(), caller, ": statistics must hold ",
                shapes.size(), " tensors, got ", statistics.size());
  for (size_t i = 0; i < shapes.size(); ++i) {
    const bool counter = i % 3 == 2;
    check_values(caller, "a running statistic", statistics[i], shapes[i],
                 counter ? ScalarType::Long : plan.dtype, plan);
    plan.memory.statistics[i] = statistics[i].data_ptr();
  }
}

}  // namespace

void keep_apart(Plan& plan, SweepInputs& inputs) {
  const auto apart = [&](Tensor& given) {
    const auto* begin = static_cast<const char*>(given.data_ptr());
    const char* end = begin + given.numel() * 8;  // of any dtype
    const auto meets = [&](const void* written, int64_t bytes) {
      const auto* first = static_cast<const char*>(written);
      return written != nullptr && first < end && begin < first + bytes;
    };
    bool found = false;
    for (size_t i = 0; i < plan.parameter_bytes.size(); ++i) {
      const ParameterMemory& memory = plan.memory.parameters[i];
      for (const void* written : {memory.value, memory.first, memory.second}) {
        found = found || meets(written, plan.parameter_bytes[i]);
      }
    }
    for (size_t i = 0; i < plan.statistic_bytes.size(); ++i) {
      found = found || meets(plan.memory.statistics[i], plan.statistic_bytes[i]);
    }
    if (found) given = torch::stable::clone(given);
  };
  apart(inputs.x);
  if (inputs.target) apart(*inputs.target);
  if (inputs.context) apart(*inputs.context);
  bind_inputs(plan, inputs);
}

bool can_be_repeated(Plan& plan) {
  LastStep& last = plan.last;
  last.bound = false;
  if (!last.known) return false;
  const Tensors& parameters = last.parameters.tensors();
  const Tensors& statistics = last.statistics.tensors();
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (!has_values(parameters[i], plan.expected.parameters[i], plan.dtype)) return false;
    if (!is_placed(parameters[i], placement(plan))) return false;
    plan.memory.parameters[i].value = parameters[i].data_ptr();
  }
  for (size_t i = 0; i < statistics.size(); ++i) {
    const ScalarType dtype = i % 3 == 2 ? ScalarType::Long : plan.dtype;
    if (!has_values(statistics[i], plan.expected.statistics[i], dtype)) return false;
    plan.memory.statistics[i] = statistics[i].data_ptr();
  }
  for (const Tensor& kept : last.state.tensors()) {
    if (!kept.is_contiguous()) return false;
  }
  bind_active(plan, last.active);
  return last.bound = true;
}

void check_target(const std::string& caller, const Tensor& target, int64_t batch, int64_t outputs,
                  const std::string& criterion) {
  const std::string rows = std::to_string(batch);
  if (named<Criterion>(caller, "criterion", criterion,
                       {{"cross_entropy", Criterion::cross_entropy}, {"mse", Criterion::mse}}) ==
      Criterion::mse) {
    const Shape wanted{batch, outputs};
    FASTDNI_CHECK(shape_of(target) == wanted, caller,
                  ": target must be (B, N) = ", to_string(wanted), ", got ",
                  to_string(shape_of(target)));
    return;
  }
  FASTDNI_CHECK(target.scalar_type() == ScalarType::Long, caller,
                ": target must be int64 labels for cross_entropy, got ",
                to_string(target.scalar_type()));
  FASTDNI_CHECK(shape_of(target) == Shape{batch}, caller, ": target must be (B,) = (", rows,
                ",), got ", to_string(shape_of(target)));
  if (!target.is_cpu()) return;  // to read the labels would be to wait for the device
  const Tensor contiguous = as_contiguous(target);
  const auto* labels = data<int64_t>(contiguous);
  for (int64_t r = 0; r < batch; ++r) {
    FASTDNI_CHECK((labels[r] >= 0 && labels[r] < outputs) || labels[r] == kIgnoreIndex, caller,
                  ": target must hold labels from 0 to ", outputs - 1, " (or ", kIgnoreIndex,
                  " for rows to ignore), got ", labels[r], " in row ", r);
  }
}

SweepInputs bind_data(const std::string& caller, Plan& plan, const Tensor& x,
                      const OptionalTensor& target, const OptionalTensor& context,
                      const Tensors& noise) {
  SweepInputs inputs = check_inputs(caller, plan, x, target, context);
  bind_inputs(plan, inputs);
  bind_noise(caller, plan, noise);
  return inputs;
}

SweepInputs bind_forward(const std::string& caller, Plan& plan, const Tensor& x,
                         const OptionalTensor& target, const OptionalTensor& context,
                         const OptionalTensor& network_input, const Tensors& noise,
                         const Tensors& parameters, const Tensors& statistics,
                         const Integers& active) {
  SweepInputs inputs = bind_data(caller, plan, x, target, context, noise);
  FASTDNI_CHECK(network_input.has_value() == plan.spec.separate_input, caller,
                ": network_input must be given to plans with a separate input, and to no others");
  if (network_input.has_value()) {
    inputs.network_input = as_contiguous(*network_input);
    check_values(caller, "network_input", *inputs.network_input,
                 {plan.spec.batch, plan.spec.stages[0].input_synthesizer.widths.front()},
                 plan.dtype, plan);
    plan.memory.network_input = inputs.network_input->data_ptr();
  }
  bind_parameters(caller, plan, parameters, active);
  bind_statistics(caller, plan, statistics);
  return inputs;
}

OptimizerBinding bind_optimizer(const std::string& caller, Plan& plan, const Tensors& state,
                                const Integers& groups, const std::vector<double>& settings) {
  const std::vector<int64_t>& stages = plan.expected.parameter_stages;
  for (size_t i = 0; i < std::min(groups.size(), stages.size()); ++i) {
    FASTDNI_CHECK(groups[i] < 0 || plan.memory.active[stages[i]], caller,
                  ": groups must be -1 for the parameters of a masked stage");
  }
  return bind_optimizer(caller, placement(plan), Layout::contiguous, plan.expected.parameters,
                        state, groups, settings, plan.memory.parameters);
}

OptimizerBinding bind_update(const std::string& caller, Plan& plan, const OptionalTensor& gradient,
                             const Tensors& parameters, const Tensors& state,
                             const Integers& groups, const std::vector<double>& settings,
                             const Integers& active, OptionalTensor& arrived) {
  FASTDNI_CHECK(!parameters.empty(), caller, ": parameters must hold tensors, got none");
  FASTDNI_CHECK(plan.goes_on, caller, ": plan has no forward pass to go on from");
  bind_parameters(caller, plan, parameters, active);
  OptimizerBinding optimizer = bind_optimizer(caller, plan, state, groups, settings);
  plan.memory.gradient = nullptr;
  const bool wanted = plan.spec.criterion == Criterion::none && plan.memory.active.back();
  FASTDNI_CHECK(gradient.has_value() || !wanted, caller,
                ": gradient must be given for the topmost synthesizer, got None");
  if (gradient.has_value()) {
    arrived = as_contiguous(*gradient);
    check_values(caller, "gradient", *arrived, {plan.spec.batch, plan.spec.stages.back().outputs},
                 plan.dtype, plan);
    plan.memory.gradient = arrived->data_ptr();
  }
  return optimizer;
}

}  // namespace fastdni
