#include "ops/optimizer_binding.h"

#include <cmath>

namespace fastdni {
namespace {

OptimizerSettings settings_of(const std::vector<double>& settings, int64_t group) {
  OptimizerSettings result;
  if (group < 0) return result;
  const double* row = settings.data() + group * kOptimizerNumbers;
  result.rule = static_cast<Rule>(static_cast<int>(row[0]));
  result.lr = row[1];
  result.weight_decay = row[2];
  result.a = row[3];
  result.b = row[4];
  result.eps = row[5];
  result.nesterov = row[6] != 0;
  return result;
}

// Null where the number is on the CPU.
DeviceNumber device_number(const std::string& caller, const char* name, const Tensor& tensor,
                           const Placement& placement) {
  const ScalarType dtype = tensor.scalar_type();
  FASTDNI_CHECK(tensor.numel() == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double),
                caller, ": ", name, " must be one float32 or float64 number, got ",
                to_string(dtype), " ", to_string(shape_of(tensor)));
  if (tensor.is_cpu()) return {};
  check_device(caller, name, tensor, placement);
  return {tensor.data_ptr(), dtype == ScalarType::Double};
}

double host_number(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? *data<float>(tensor) : *data<double>(tensor);
}

void check_kept(const std::string& caller, const Tensor& tensor, const Shape& shape,
                const Placement& placement, Layout layout) {
  constexpr const char* kName = "a parameter's optimizer state (or gradient)";
  const auto sizes = tensor.sizes();
  const bool same_shape = std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
  const bool contiguous = layout == Layout::contiguous;
  FASTDNI_CHECK(same_shape && tensor.scalar_type() == placement.dtype &&
                    (tensor.is_contiguous() || !contiguous),
                caller, ": ", kName, " must be a ", contiguous ? "contiguous " : "",
                to_string(placement.dtype), " tensor of shape ", to_string(shape), ", got ",
                to_string(tensor.scalar_type()), " ", to_string(shape_of(tensor)));
  check_device(caller, kName, tensor, placement);
}

}  // namespace

Placement placement_of(const Tensor& tensor, const char* as) {
  std::optional<int32_t> gpu;
  if (!tensor.is_cpu()) gpu = tensor.get_device_index();
  return {tensor.scalar_type(), gpu, as};
}

bool is_placed(const Tensor& tensor, const Placement& placement) {
  if (!placement.gpu) return tensor.is_cpu();
  return !tensor.is_cpu() && tensor.get_device_index() == *placement.gpu;
}

void check_device(const std::string& caller, const char* name, const Tensor& tensor,
                  const Placement& placement) {
  FASTDNI_CHECK(is_placed(tensor, placement), caller, ": ", name, " must be on ",
                placement.gpu ? "cuda:" + std::to_string(*placement.gpu) : "the CPU", ", as ",
                placement.as);
}

void* OptimizerBinding::memory_of(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor.data_ptr();
  copies_.emplace_back(tensor, torch::stable::contiguous(tensor));
  return copies_.back().second.data_ptr();
}

void OptimizerBinding::raise_steps() const {
  for (const Tensor* step : steps_) {
    if (step->scalar_type() == ScalarType::Float) {
      ++*mutable_data<float>(*step);
    } else {
      ++*mutable_data<double>(*step);
    }
  }
}

void OptimizerBinding::write_back() {
  for (auto& [tensor, copy] : copies_) {
    Shape strides;
    for (int64_t i = 0; i < tensor.dim(); ++i) strides.push_back(tensor.stride(i));
    // The memory alone: autograd would refuse a leaf.
    Tensor bare = view(tensor, shape_of(tensor), strides);
    torch::stable::copy_(bare, copy);
  }
}

OptimizerBinding bind_optimizer(const std::string& caller, const Placement& placement,
                                Layout layout, const std::vector<Shape>& shapes,
                                const Tensors& state, const Integers& groups,
                                const std::vector<double>& settings,
                                std::vector<ParameterMemory>& parameters) {
  FASTDNI_CHECK(groups.size() == shapes.size(), caller, ": groups must hold ", shapes.size(),
                " numbers, got ", groups.size());
  FASTDNI_CHECK(settings.size() % kOptimizerNumbers == 0, caller, ": settings must be rows of ",
                kOptimizerNumbers);
  const int64_t rows = settings.size() / kOptimizerNumbers;
  OptimizerBinding binding(shapes.size());
  size_t next = 0;
  const auto take = [&]() -> const Tensor& {
    FASTDNI_CHECK(next < state.size(), caller, ": state holds too few tensors: ", state.size());
    return state[next++];
  };
  for (size_t i = 0; i < shapes.size(); ++i) {
    FASTDNI_CHECK(groups[i] < rows, caller, ": groups must be below ", rows, ", got ", groups[i]);
    ParameterMemory& memory = parameters[i];
    memory.settings = settings_of(settings, groups[i]);
    memory.first = memory.second = nullptr;
    memory.device_step = memory.device_lr = {};
    const auto take_values = [&] {
      const Tensor& tensor = take();
      check_kept(caller, tensor, shapes[i], placement, layout);
      return binding.memory_of(tensor);
    };
    switch (memory.settings.rule) {
      case Rule::none:
      case Rule::sgd:
        break;
      case Rule::gradient:
      case Rule::sgd_momentum:
        memory.first = take_values();
        break;
      case Rule::adam:
      case Rule::adamw: {
        memory.first = take_values();
        memory.second = take_values();
        const Tensor& step = take();
        memory.device_step = device_number(caller, "an optimizer's step", step, placement);
        if (memory.device_step.at == nullptr) {
          memory.step = 1 + host_number(step);
          binding.count(step);
        }
        break;
      }
      default:
        FASTDNI_CHECK(false, caller, ": settings must begin with a rule from 0 to 5");
    }
    if (std::isnan(memory.settings.lr)) {
      const Tensor& lr = take();
      memory.device_lr = device_number(caller, "an optimizer's learning rate", lr, placement);
      if (memory.device_lr.at == nullptr) memory.settings.lr = host_number(lr);
    }
  }
  FASTDNI_CHECK(next == state.size(), caller, ": state holds too many tensors: ", state.size());
  return binding;
}

}  // namespace fastdni
