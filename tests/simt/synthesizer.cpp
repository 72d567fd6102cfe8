// A linear synthesizer's prediction and its regression, or one ReLU layer and the way back through
// it, and an update whose numbers are on the GPU; see tests/test_cuda_synthesizer.py.
#include "cuda/kernels/synthesizer.cu"

#include "case.h"

namespace {

using namespace fastdni;
using cuda::Operand;

// A gradient that is handed out.
template <class T>
cuda::SynthesizerParameter<T> written_to(T* gradient) {
  cuda::SynthesizerParameter<T> parameter{};
  parameter.parameter.first = gradient;
  parameter.parameter.update.rule = Rule::gradient;
  return parameter;
}

// Adam's, with the step count (raised from 2) and the learning rate on the GPU.
template <class T>
struct Adam {
  T* value;
  T* first;
  T* second;
  T* step;
  T lr = T(0.1);
  Update<T> update;

  Adam(simt::Case& io, const T* from, int64_t count)
      : value(io.output<T>(count)),
        first(io.output<T>(count)),
        second(io.output<T>(count)),
        step(io.output<T>(1)) {
    for (int64_t i = 0; i < count; ++i) {
      value[i] = from[i];
      first[i] = second[i] = T(0.5);
    }
    *step = 2;
  }

  cuda::SynthesizerParameter<T> prepared() {
    constexpr bool wide = sizeof(T) == sizeof(double);
    cuda::SweepParameter<T> parameter{};
    parameter.value = value;
    parameter.first = first;
    parameter.second = second;
    parameter.update.rule = Rule::adam;
    parameter.settings = {Rule::adam, 0, 0.01, 0.8, 0.9, 1e-8, false};
    parameter.step = {step, wide};
    parameter.lr = {&lr, wide};
    cuda::launch_synthesizer_prepare(parameter, &update, nullptr);
    return {parameter, &update};
  }
};

template <class T>
void run(simt::Case& io) {
  const int64_t rows = io.integer("rows"), inputs = io.integer("inputs");
  const int64_t outputs = io.integer("outputs"), context = io.integer("context");
  const double divisor = io.real("divisor");
  const T* x = io.input<T>(rows * inputs);
  const T* weight = io.input<T>(outputs * inputs);
  const T* bias = io.input<T>(outputs);
  const T* ctx = io.input<T>(rows * context);
  const T* ctx_weight = io.input<T>(outputs * context);
  const T* ctx_bias = io.input<T>(outputs);
  const T* target = io.input<T>(rows * outputs);
  T* prediction = io.output<T>(rows * outputs);
  T* grad = io.output<T>(rows * outputs);
  T* below = io.output<T>(rows * inputs);
  T* weight_grad = io.output<T>(outputs * inputs);
  T* bias_grad = io.output<T>(outputs);
  T* second_grad = io.output<T>(outputs);
  T* ctx_grad = io.output<T>(outputs * context);
  T* loss = io.output<T>(1);
  const bool updates = io.integer("updates", 0);
  T* difference = updates ? io.output<T>(rows * outputs) : nullptr;

  cuda::SweepStep<T> step{};
  step.batch = rows;
  step.divisor = divisor;
  step.scale = static_cast<T>(2 / divisor);
  step.context = ctx;
  cuda::Instruction layer;
  layer.columns = static_cast<int32_t>(outputs);
  layer.depth = static_cast<int32_t>(inputs);
  layer.a = Operand::address(x);
  layer.weight = Operand::address(weight);
  layer.bias = Operand::address(bias);
  layer.second_bias = Operand::address(ctx_bias);
  layer.context = static_cast<int32_t>(context);
  layer.context_weight = Operand::address(ctx_weight);
  layer.activation = Activation::relu;
  layer.out = Operand::address(prediction);
  cuda::launch_synthesizer_layer(step, layer, nullptr);

  const int64_t partial_count = (rows + cuda::kSweepRows - 1) / cuda::kSweepRows *
                                ((outputs + cuda::kSweepColumns - 1) / cuda::kSweepColumns);
  step.workspace = io.scratch<T>(partial_count);
  cuda::Instruction error;
  error.columns = layer.columns;
  error.finish = cuda::Finish::regress;
  error.a = Operand::address(target);
  error.other = layer.out;
  error.out = Operand::address(grad);
  error.dz = Operand::address(difference);
  error.partials = 0;
  cuda::launch_synthesizer_layer(step, error, nullptr);

  cuda::Instruction back;  // through a ReLU whose activations are x
  back.columns = static_cast<int32_t>(inputs);
  back.depth = static_cast<int32_t>(outputs);
  back.transposed = true;
  back.finish = cuda::Finish::differentiate;
  back.activation = Activation::relu;
  back.a = error.out;
  back.weight = layer.weight;
  back.other = layer.a;
  back.out = Operand::address(below);
  cuda::launch_synthesizer_layer(step, back, nullptr);

  cuda::SynthesizerGradient<T> args{};
  args.grad = grad;
  args.input = x;
  args.rows = rows;
  args.outputs = layer.columns;
  args.inputs = layer.depth;
  args.weight = written_to(weight_grad);
  args.bias = written_to(bias_grad);
  args.second_bias = written_to(second_grad);
  args.loss = loss;
  args.partials = step.workspace;
  args.partial_count = partial_count;
  args.divisor = divisor;
  cuda::launch_synthesizer_gradient(args, Precision::exact, nullptr);
  args.second_bias = {};
  if (updates) {
    Adam<T> of_weight(io, weight, outputs * inputs), of_bias(io, bias, outputs);
    args.weight = of_weight.prepared();
    args.bias = of_bias.prepared();
    args.ready = io.integer("ready", 0) ? weight_grad : nullptr;
    cuda::launch_synthesizer_gradient(args, Precision::exact, nullptr);
  }
  args.input = ctx;
  args.inputs = layer.context;
  args.weight = written_to(ctx_grad);
  args.bias = {};
  args.ready = nullptr;
  args.loss = nullptr;
  cuda::launch_synthesizer_gradient(args, Precision::exact, nullptr);
}

const simt::Register kCase("synthesizer", [](simt::Case& io) {
  simt::for_dtype<float, double>(io.text("dtype"), [&](auto zero) { run<decltype(zero)>(io); });
});

}  // namespace
