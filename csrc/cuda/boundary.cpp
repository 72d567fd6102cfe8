// boundary_ on a GPU: the launches of the synthesizer ops, the last of which update what they have
// the gradient of.
#include "ops/boundary.h"

#include "common/names.h"
#include "cuda/device.h"
#include "cuda/parameters.h"
#include "cuda/synthesizer.h"

namespace fastdni::cuda {
namespace {

constexpr const char* kOp = "boundary";

// The parameters with their updates. Those that the GPU works out are in `prepared`.
template <class T>
std::vector<SynthesizerParameter<T>> prepare(const BoundaryArguments& given, const Tensor& like,
                                             cudaStream_t stream, OptionalTensor& prepared) {
  const auto count = static_cast<int64_t>(given.memory.size());
  std::vector<SynthesizerParameter<T>> parameters(count);
  for (int64_t i = 0; i < count; ++i) {
    parameters[i].parameter = parameter_of<T>(given.memory[i]);
    if (!is_prepared_there(parameters[i].parameter)) continue;
    if (!prepared) {
      const auto bytes = static_cast<int64_t>(count * sizeof(Update<T>));
      prepared = empty(like, {bytes}, aoti_torch_dtype_uint8());
    }
    Update<T>* const at = static_cast<Update<T>*>(prepared->data_ptr()) + i;
    check(kOp, launch_synthesizer_prepare(parameters[i].parameter, at, stream));
    parameters[i].prepared = at;
  }
  return parameters;
}

std::tuple<Tensor, Tensor, Tensor> boundary(
    const std::string& caller, const Tensor& trigger, const OptionalTensor& context,
    const Tensor& target, const Tensors& parameters, int64_t layers, bool bias,
    const Tensors& state, const Integers& groups, const std::vector<double>& settings, double scale,
    const OptionalTensor& prediction, const Tensors& hidden, const std::string& precision) {
  const OnDevice device(trigger);
  const cudaStream_t stream = device.stream();
  BoundaryArguments given = check_boundary(caller, trigger, context, target, parameters, layers,
                                           bias, state, groups, settings, prediction, hidden);
  const Precision how = precision_named(caller, precision);
  check_cuda_dtype(caller, trigger);
  if (is_captured(kOp, stream)) {
    for (const ParameterMemory& parameter : given.memory) check_count_in_graph(kOp, parameter);
  }
  std::tuple<Tensor, Tensors> made;
  if (prediction.has_value()) {
    made = {*prediction, hidden};
  } else {
    made = evaluate_synthesizer(trigger, context, given.weights, given.biases, given.context_weight,
                                given.context_bias, how, stream);
  }
  const auto& [message, activations] = made;
  const Tensor error = empty(trigger, shape_of(message));
  Tensor loss;
  given.optimizer.raise_steps();
  with_cuda_dtype(trigger, [&](auto scalar) {
    OptionalTensor prepared;
    const auto updated = prepare<decltype(scalar)>(given, trigger, stream, prepared);
    loss = regress_synthesizer(target, message, activations, trigger, context, given.weights, bias,
                               2 / scale, error, updated, how, stream);
  });
  given.optimizer.write_back();
  return {loss, prediction.has_value() ? empty(trigger, {0}) : message, error};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdni, FASTDNI_CUDA_KEY, m) {
  m.impl("boundary_", TORCH_BOX(&boundary));
}

}  // namespace fastdni::cuda
