#include "cuda/kernels/launch.h"
#include "cuda/kernels/synthesizer.cuh"
#include "cuda/kernels/with_precision.h"

namespace fastdni::cuda {

template <class T>
cudaError_t launch_synthesizer_layer(const SweepStep<T>& step, const Instruction& op,
                                     cudaStream_t stream) {
  const LaunchPlan plan{(step.batch + kSweepRows - 1) / kSweepRows, kSweepThreads, op.tiles()};
  return with_precision<T>(step.precision, [&](auto precision) {
    return launch(synthesizer_layer_kernel<precision(), T>, plan, stream, step, op);
  });
}

template <class T>
cudaError_t launch_synthesizer_gradient(const SynthesizerGradient<T>& args, Precision precision,
                                        cudaStream_t stream) {
  const bool tiled = args.weight.parameter.update.rule != Rule::none && args.inputs > 0;
  const LaunchPlan plan{(args.outputs + kSweepRows - 1) / kSweepRows + 1, kSweepThreads,
                        tiled ? column_tiles(args.inputs) : 1};
  return with_precision<T>(precision, [&](auto kind) {
    return launch(synthesizer_gradient_kernel<kind(), T>, plan, stream, args);
  });
}

template <class T>
cudaError_t launch_synthesizer_prepare(const SweepParameter<T>& parameter, Update<T>* prepared,
                                       cudaStream_t stream) {
  return launch(synthesizer_prepare_kernel<T>, {1, 1}, stream, parameter, prepared);
}

#define INSTANTIATE(T)                                                                       \
  template cudaError_t launch_synthesizer_layer(const SweepStep<T>&, const Instruction&,     \
                                                cudaStream_t);                               \
  template cudaError_t launch_synthesizer_gradient(const SynthesizerGradient<T>&, Precision, \
                                                   cudaStream_t);                            \
  template cudaError_t launch_synthesizer_prepare(const SweepParameter<T>&, Update<T>*,      \
                                                  cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace fastdni::cuda
