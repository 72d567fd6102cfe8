// A step of a network that its parameters describe; see tests/test_cuda_sweep.py.
#include "cuda/kernels/sweep.cu"

#include <list>
#include <sstream>

#include "case.h"
#include "common/names.h"
#include "cuda/kernels/sweep_builder.h"

namespace {

using namespace fastdni;

constexpr const char* kOp = "sweep";

std::vector<int64_t> numbers(const std::string& text) {
  std::vector<int64_t> found;
  std::istringstream from(text);
  for (std::string number; std::getline(from, number, '-');) found.push_back(std::stoll(number));
  return found;
}

NetworkSpec read_spec(simt::Case& io) {
  NetworkSpec spec;
  const std::vector<int64_t> widths = numbers(io.text("widths"));
  const int64_t hidden = io.integer("hidden"), context = io.integer("context");
  const bool bias = io.integer("bias"), unlocked = io.integer("unlocked"), top = io.integer("top");
  spec.batch = io.integer("batch");
  spec.criterion = criterion_named(kOp, io.text("criterion"));
  spec.precision = precision_named(kOp, io.text("precision"));
  spec.input_gradient = io.integer("input_gradient", 0);
  const auto synthesizer = [&](int64_t inputs, int64_t outputs) {
    SynthesizerSpec made;
    made.widths = {inputs};
    made.widths.insert(made.widths.end(), hidden, outputs + 3);
    made.widths.push_back(outputs);
    made.bias = bias;
    made.context = context;
    return made;
  };
  for (size_t s = 0; s + 1 < widths.size(); ++s) {
    const bool last = s + 2 == widths.size();
    StageSpec stage;
    stage.inputs = widths[s];
    stage.outputs = widths[s + 1];
    stage.bias = bias;
    if (!last || top) {
      stage.batch_norm = io.integer("norm");
      stage.affine = io.integer("affine", 1);
      stage.momentum = io.real("momentum");
      stage.activation = activation_named(kOp, io.text("activation"));
      stage.synthesizer = synthesizer(stage.outputs, stage.outputs);
      if (unlocked) stage.input_synthesizer = synthesizer(widths[0], stage.outputs);
    }
    spec.stages.push_back(stage);
  }
  return spec;
}

// What torch's library makes on a GPU.
template <class T>
void multiply(const cuda::LibraryProduct& product, const T* a, const T* b, T* out) {
  const auto& [of_a, of_b, of_out, rows, columns, depth, a_transposed, b_transposed, stage,
               parameter] = product;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      T sum = 0;
      for (int64_t k = 0; k < depth; ++k) {
        sum += a[a_transposed ? k * rows + r : r * depth + k] *
               b[b_transposed ? c * depth + k : k * columns + c];
      }
      out[r * columns + c] = sum;
    }
  }
}

// Arrays in the order of the test: x, target, [context], [gradient], then of each parameter its
// value and what its optimizer keeps, then the statistics.
template <class T>
void run(simt::Case& io) {
  const NetworkSpec spec = read_spec(io);
  const cuda::SweepProgram program = cuda::make_sweep_program(spec, io.integer("library_from"));
  const std::vector<cuda::Task> tasks = cuda::sweep_tasks(program);
  const int64_t outputs = spec.stages.back().outputs, inputs = spec.stages[0].inputs;

  cuda::SweepStep<T> step{};
  step.instructions = program.instructions.data();
  step.reductions = program.reductions.data();
  step.jobs = program.jobs.data();
  step.tasks = tasks.data();
  step.task_count = static_cast<int32_t>(tasks.size());
  step.bias_task_count = static_cast<int32_t>(cuda::sweep_bias_tasks(program));
  step.losses = program.synthesis.data();
  step.loss_count = static_cast<int32_t>(program.synthesis.size());
  step.criterion_loss = program.criterion;
  step.label_counts = program.label_counts;
  step.workspace = io.scratch<T>(program.workspace);
  step.batch = spec.batch;
  step.divisor = static_cast<double>(spec.batch);
  step.scale = static_cast<T>(2 / step.divisor);
  step.outputs = static_cast<int32_t>(outputs);
  step.criterion = spec.criterion;
  step.precision = spec.precision;
  step.x = io.input<T>(spec.batch * inputs);
  if (spec.criterion == Criterion::mse) {
    step.target = io.input<T>(spec.batch * outputs);
  } else {
    step.target = io.input<int64_t>(spec.batch);
  }
  const int64_t context = io.integer("context");
  if (io.integer("explicit_context")) step.context = io.input<T>(spec.batch * context);
  if (spec.criterion == Criterion::none) step.gradient = io.input<T>(spec.batch * outputs);
  for (const int64_t stage : numbers(io.text("active"))) step.active.set(stage);

  step.output = io.output<T>(spec.batch * outputs);
  step.loss = io.output<T>(1);
  step.synthesis_loss = io.output<T>(program.synthesis.size());
  T* input_gradient = io.output<T>(spec.input_gradient ? spec.batch * inputs : 0);
  step.input_gradient = input_gradient;
  if (spec.criterion == Criterion::none) step.loss = nullptr;

  OptimizerSettings settings;
  settings.rule = static_cast<Rule>(io.integer("rule"));
  settings.lr = io.real("lr");
  settings.weight_decay = io.real("weight_decay");
  settings.a = io.real("a");
  settings.b = io.real("b");
  settings.eps = io.real("eps");
  settings.nesterov = io.integer("nesterov");
  const int64_t kept = io.integer("kept");
  const auto updated_copy = [&](int64_t count) {  // what is read in is handed back as it is then
    const T* from = io.input<T>(count);
    T* made = io.output<T>(count);
    std::copy(from, from + count, made);
    return made;
  };
  // The step counts and the learning rate, where the kernels read them.
  const bool on_device = io.integer("on_device", 0);
  std::list<double> steps;
  float lr = static_cast<float>(settings.lr);
  std::vector<cuda::SweepParameter<T>> parameters;
  const std::vector<int64_t> sizes = numbers(io.text("sizes"));
  const std::vector<int64_t> stages = numbers(io.text("stages"));
  for (size_t i = 0; i < sizes.size(); ++i) {
    cuda::SweepParameter<T> parameter{};
    parameter.value = updated_copy(sizes[i]);
    if (step.active.has(stages[i])) {
      if (kept > 0) parameter.first = updated_copy(sizes[i]);
      if (kept > 1) parameter.second = updated_copy(sizes[i]);
      const double count = io.integer("steps") + 1;
      if (on_device) {
        parameter.update.rule = settings.rule;
        parameter.settings = settings;
        parameter.settings.lr = 0;
        parameter.lr = {&lr, false};
        steps.push_back(count - 1);
        parameter.step = {&steps.back(), true};
      } else {
        parameter.update =
            prepared<T>(settings, count, [](double beta, double n) { return std::pow(beta, n); });
      }
    }
    parameters.push_back(parameter);
  }
  step.parameters = parameters.data();
  step.parameter_count = static_cast<int32_t>(parameters.size());
  step.prepares = on_device;
  std::vector<void*> statistics;
  for (const StageSpec& stage : spec.stages) {
    if (!stage.batch_norm || !stage.running) continue;
    statistics.push_back(updated_copy(stage.outputs));
    statistics.push_back(updated_copy(stage.outputs));
    const int64_t* from = io.input<int64_t>(1);
    int64_t* count = io.output<int64_t>(1);
    *count = *from;
    statistics.push_back(count);
  }
  step.statistics = statistics.data();

  const std::string named = io.text("spread");
  const cuda::Spread spread = named == "rows"       ? cuda::Spread::rows
                              : named == "clusters" ? cuda::Spread::clusters
                                                    : cuda::Spread::phases;
  int64_t made = 0;
  const cuda::Library library = [&](const cuda::LibraryProduct& product) {
    const auto at = [&](const cuda::Operand& operand) { return cuda::resolve(step, operand); };
    multiply(product, at(product.a), at(product.b), at(product.out));
    ++made;
  };
  cuda::launch_sweep_forward(step, program, spread, library, nullptr);
  cuda::launch_sweep_regression(step, program, spread, library, nullptr);
  if (spec.input_gradient && step.loss != nullptr) {
    cuda::launch_sweep_loss(step, nullptr);
    step.loss = nullptr;
  }
  cuda::launch_sweep_update(step, program, library, nullptr);
  if ((made > 0) != (io.integer("library_from") == 1)) {
    throw std::logic_error("the library made " + std::to_string(made) + " products");
  }
  for (double count : steps) {
    if (count != io.integer("steps") + 1) throw std::logic_error("a step count was not raised");
  }
}

const simt::Register kCase("sweep", [](simt::Case& io) {
  simt::for_dtype<float, double>(io.text("dtype"), [&](auto zero) { run<decltype(zero)>(io); });
});

}  // namespace
