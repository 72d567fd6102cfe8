// The argument rules of the synthesizer ops, for every device.
#pragma once
#include "ops/tensor.h"

namespace fastdni {

inline constexpr const char* kSynthesizer = "synthesizer";

inline Shape with_last(Shape shape, int64_t last) {
  shape.back() = last;
  return shape;
}

void check_synthesizer(const Tensor& trigger, const OptionalTensor& context, const Tensors& weights,
                       const Tensors& biases, const OptionalTensor& context_weight,
                       const OptionalTensor& context_bias);

void check_synthesizer_bwd(const Tensor& target, const Tensor& prediction, const Tensors& hidden,
                           const Tensor& trigger, const OptionalTensor& context,
                           const Tensors& weights, bool bias, const std::string& reduction);

}  // namespace fastdni
