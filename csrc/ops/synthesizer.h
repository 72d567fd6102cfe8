// The argument rules of the synthesizer ops, for every device.
#pragma once
#include <optional>

#include "ops/tensor.h"

namespace fastdni {

inline constexpr const char* kSynthesizer = "synthesizer";

inline Shape with_last(Shape shape, int64_t last) {
  shape.back() = last;
  return shape;
}

void check_synthesizer(const std::string& caller, const Tensor& trigger,
                       const OptionalTensor& context, const Tensors& weights, const Tensors& biases,
                       const OptionalTensor& context_weight, const OptionalTensor& context_bias);

inline void check_kernel_dtype(const std::string& caller, const Tensor& trigger) {
  FASTDNI_CHECK(has_kernel(trigger.scalar_type()), caller,
                ": trigger must be float32, float64 or bfloat16, got ",
                to_string(trigger.scalar_type()));
}

// What a forward pass with these weights may have returned.
void check_activations(const std::string& caller, const Tensor& prediction, const Tensors& hidden,
                       const Tensor& trigger, const Tensors& weights);

void check_regression_target(const std::string& caller, const Tensor& target, const Tensor& trigger,
                             const Tensors& weights);

// Returns what the sum of squared errors is divided by; half of that times `scale` is one.
double check_synthesizer_bwd(const Tensor& target, const Tensor& prediction, const Tensors& hidden,
                             const Tensor& trigger, const OptionalTensor& context,
                             const Tensors& weights, const std::string& reduction,
                             std::optional<double> scale);

}  // namespace fastdni
