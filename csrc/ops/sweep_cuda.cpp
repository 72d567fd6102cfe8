// The sweep on a GPU: the program of csrc/cuda/sweep_program.h, its tables in device memory, and a
// step's pointers.
#include "ops/sweep_plan.h"

#if defined(FASTDNI_CUDA)
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>

#include "cuda/sweep.h"
#include "ops/cuda.h"
#include "ops/library_product.h"

namespace fastdni {
namespace {

constexpr const char* kOp = "sweep";
// Wider stages have enough columns to give every multiprocessor a tile of one instruction; below,
// launches cost more than idle multiprocessors do. Estimated, not measured.
constexpr int64_t kWideOutputs = 512;

// Tables in one piece of device memory.
class DeviceTables {
 public:
  // Places `count` elements behind what is there; returns their offset.
  template <class Element>
  size_t add(const Element* elements, size_t count) {
    const size_t offset = (bytes_.size() + 15) / 16 * 16;
    bytes_.resize(offset + count * sizeof(Element));
    if (count > 0) std::memcpy(bytes_.data() + offset, elements, count * sizeof(Element));
    return offset;
  }
  template <class Element>
  size_t add(const std::vector<Element>& elements) {
    return add(elements.data(), elements.size());
  }
  void clear() { bytes_.clear(); }

  // The copy is made from pageable memory, which the driver has read when it returns; it follows
  // what the stream does with the old tables.
  void upload(const Tensor& like, cudaStream_t stream) {
    // A graph would go on reading where the host's bytes are now.
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    cuda::check(kOp, cudaStreamIsCapturing(stream, &capture));
    FASTDNI_CHECK(capture == cudaStreamCaptureStatusNone, kOp,
                  ": a step in a CUDA graph must be one like the step before it: run it once "
                  "before the capture, with numbers of the optimizer that live on the GPU "
                  "(capturable=True)");
    if (capacity_ < bytes_.size()) {
      memory_ = empty(like, {static_cast<int64_t>(bytes_.size())}, aoti_torch_dtype_uint8());
      capacity_ = bytes_.size();
    }
    cuda::check(kOp, cudaMemcpyAsync(memory_->data_ptr(), bytes_.data(), bytes_.size(),
                                     cudaMemcpyHostToDevice, stream));
    is_there_ = true;
  }
  bool is_there() const { return is_there_; }
  template <class Element>
  Element* at(size_t offset) const {
    return reinterpret_cast<Element*>(static_cast<std::byte*>(memory_->data_ptr()) + offset);
  }

 private:
  std::vector<std::byte> bytes_;
  bool is_there_ = false;
  std::optional<Tensor> memory_;
  size_t capacity_ = 0;
};

template <class T>
class CudaSweep final : public Sweep {
 public:
  explicit CudaSweep(const NetworkSpec& spec)
      : spec_(spec), program_(cuda::make_sweep_program(spec, library_from(spec))) {
    const std::vector<cuda::Task> tasks = cuda::sweep_tasks(program_);
    task_count_ = static_cast<int32_t>(tasks.size());
    instructions_ = fixed_.add(program_.instructions);
    reductions_ = fixed_.add(program_.reductions);
    jobs_ = fixed_.add(program_.jobs);
    tasks_ = fixed_.add(tasks);
    losses_ = fixed_.add(program_.synthesis);
    bool wide = false;
    for (const StageSpec& stage : spec.stages) wide |= stage.outputs > kWideOutputs;
    wide |= !program_.library.empty();
    spread_ = wide                     ? cuda::Spread::instructions
              : cuda::sweep_clusters() ? cuda::Spread::clusters
                                       : cuda::Spread::rows;
  }

  std::string launches() const override {
    if (spread_ == cuda::Spread::rows) return "a block for 16 rows";
    if (spread_ == cuda::Spread::clusters) return "a cluster of 8 blocks for 16 rows";
    const size_t products = program_.library.size() + program_.gradients.size();
    return "a launch for each layer, " + std::to_string(products) + " products by torch's library";
  }

  int64_t workspace_bytes() const override { return program_.workspace * sizeof(T); }

  void forward(const StepMemory& memory) override {
    step_ = begin(memory);
    cuda::check(
        kOp, cuda::launch_sweep_forward(step_, program_, spread_, library(memory), stream(memory)));
    if (memory.apart && step_.loss != nullptr) {
      cuda::check(kOp, cuda::launch_sweep_loss(step_, stream(memory)));
    }
  }

  void update(const StepMemory& memory) override {
    if (memory.apart) {
      step_ = begin(memory);
      step_.loss = nullptr;  // it is there since `forward`
    }
    if (memory.gradient != nullptr) {
      cuda::check(kOp, cuda::launch_sweep_regression(step_, program_, spread_, library(memory),
                                                     stream(memory)));
    }
    cuda::check(kOp, cuda::launch_sweep_update(step_, program_, library(memory), stream(memory)));
  }

 private:
  // Where the library has no bfloat16 product that sums in float32, and for float64, it is not
  // asked for one.
  static int64_t library_from(const NetworkSpec& spec) {
    const bool rounded = spec.products == Products::bfloat16;
    if (rounded && (kCudaOnHost || sizeof(T) == sizeof(double))) {
      return std::numeric_limits<int64_t>::max();
    }
    return cuda::library_from();
  }

  cuda::Library library(const StepMemory& memory) {
    return [&memory, this](const cuda::LibraryProduct& product) {
      const auto at = [&](const cuda::Operand& operand) -> void* {
        if (operand.place == cuda::Place::parameter) return memory.parameters[operand.at].value;
        return cuda::resolve(step_, operand);
      };
      const MatrixAt out{at(product.out), product.rows, product.columns, false};
      const MatrixAt a{at(product.a), product.rows, product.depth, product.a_transposed};
      const MatrixAt b{at(product.b), product.depth, product.columns, product.b_transposed};
      if (product.parameter >= 0) {
        const OptimizerSettings& settings = memory.parameters[product.parameter].settings;
        if (settings.rule == Rule::none) return;
        if (is_folded(memory.parameters[product.parameter])) {
          const MatrixAt weight{memory.parameters[product.parameter].value, product.rows,
                                product.columns, false};
          return add_library_product(*memory.like, weight, a, b, -settings.lr);
        }
      }
      if (spec_.products != Products::bfloat16) return library_product(*memory.like, out, a, b);
      if (!narrow_) narrow_ = empty(*memory.like, {narrow_elements()}, aoti_torch_dtype_bfloat16());
      library_product_bfloat16(*memory.like, out, a, b, narrow_->data_ptr());
    };
  }

  // Whether the library's product is the weight's whole update: w -= lr grad^T input.
  bool is_folded(const ParameterMemory& parameter) const {
    const OptimizerSettings& s = parameter.settings;
    return s.rule == Rule::sgd && s.weight_decay == 0 && parameter.device_lr.at == nullptr &&
           spec_.products != Products::bfloat16;
  }

  // Of the two operands of the library's products, at most.
  int64_t narrow_elements() const {
    int64_t most = 0;
    for (const auto* products : {&program_.library, &program_.gradients}) {
      for (const cuda::LibraryProduct& p : *products) {
        most = std::max(most, p.depth * (p.rows + p.columns));
      }
    }
    return most;
  }

  static cudaStream_t stream(const StepMemory& memory) {
    return static_cast<cudaStream_t>(memory.stream);
  }

  // `prepares`: whether some numbers are the GPU's own.
  std::vector<cuda::SweepParameter<T>> parameters_of(const StepMemory& memory,
                                                     bool* prepares) const {
    std::vector<cuda::SweepParameter<T>> parameters(memory.parameters.size());
    for (size_t i = 0; i < parameters.size(); ++i) {
      const ParameterMemory& from = memory.parameters[i];
      cuda::SweepParameter<T>& to = parameters[i];
      to.value = static_cast<T*>(from.value);
      to.first = static_cast<T*>(from.first);
      to.second = static_cast<T*>(from.second);
      if (from.device_step.at == nullptr && from.device_lr.at == nullptr) {
        to.update = prepared<T>(from.settings, from.step,
                                [](double beta, double n) { return std::pow(beta, n); });
        continue;
      }
      // The rule, that there is something to do; the rest is worked out there.
      *prepares = true;
      to.update.rule = from.settings.rule;
      to.settings = from.settings;
      if (from.device_lr.at != nullptr) to.settings.lr = 0;  // NaN would equal nothing
      to.count = from.step;
      to.step = from.device_step;
      to.lr = from.device_lr;
    }
    for (const cuda::LibraryProduct& gradient : program_.gradients) {
      const auto number = static_cast<size_t>(gradient.parameter);
      if (is_folded(memory.parameters[number])) parameters[number].update.rule = Rule::none;
    }
    return parameters;
  }

  // The tables on the device, and everything the kernels are told.
  cuda::SweepStep<T> begin(const StepMemory& memory) {
    const Tensor& like = *memory.like;
    if (!workspace_) workspace_ = empty(like, {program_.workspace});
    if (!fixed_.is_there()) fixed_.upload(like, stream(memory));

    bool prepares = false;
    std::vector<cuda::SweepParameter<T>> parameters = parameters_of(memory, &prepares);
    // Uploaded anew when something is another than in the step before.
    if (!of_step_.is_there() || parameters != parameters_ || memory.statistics != statistics_) {
      parameters_ = std::move(parameters);
      statistics_ = memory.statistics;
      of_step_.clear();
      of_parameters_ = of_step_.add(parameters_);
      of_statistics_ = of_step_.add(statistics_);
      of_step_.upload(like, stream(memory));
    }

    cuda::SweepStep<T> step{};
    step.instructions = fixed_.template at<cuda::Instruction>(instructions_);
    step.reductions = fixed_.template at<cuda::Reduction>(reductions_);
    step.jobs = fixed_.template at<cuda::Job>(jobs_);
    step.tasks = fixed_.template at<cuda::Task>(tasks_);
    step.losses = fixed_.template at<cuda::Loss>(losses_);
    step.task_count = task_count_;
    step.loss_count = static_cast<int32_t>(program_.synthesis.size());
    step.criterion_loss = program_.criterion;
    step.workspace = static_cast<T*>(workspace_->data_ptr());
    step.parameters = of_step_.template at<cuda::SweepParameter<T>>(of_parameters_);
    step.parameter_count = static_cast<int32_t>(parameters_.size());
    step.prepares = prepares;
    step.statistics = of_step_.template at<void*>(of_statistics_);
    step.x = static_cast<const T*>(memory.x);
    step.network_input = static_cast<const T*>(memory.network_input);
    step.context = static_cast<const T*>(memory.context);
    step.target = memory.target;
    step.gradient = static_cast<const T*>(memory.gradient);
    step.output = static_cast<T*>(memory.output);
    step.loss = spec_.criterion == Criterion::none ? nullptr : static_cast<T*>(memory.loss);
    step.synthesis_loss = static_cast<T*>(memory.synthesis_loss);
    step.input_gradient = static_cast<T*>(memory.input_gradient);
    for (size_t s = 0; s < memory.active.size(); ++s) {
      if (memory.active[s]) step.active.set(static_cast<int>(s));
    }
    step.batch = spec_.batch;
    step.divisor = static_cast<double>(spec_.batch);
    step.outputs = static_cast<int32_t>(spec_.stages.back().outputs);
    step.criterion = spec_.criterion;
    step.products = spec_.products;
    return step;
  }

  NetworkSpec spec_;
  cuda::SweepProgram program_;
  int32_t task_count_;
  cuda::Spread spread_;
  DeviceTables fixed_, of_step_;
  cuda::SweepStep<T> step_{};  // the one at work
  std::vector<cuda::SweepParameter<T>> parameters_;
  std::vector<void*> statistics_;
  size_t of_parameters_ = 0, of_statistics_ = 0;
  size_t instructions_, reductions_, jobs_, tasks_, losses_;
  std::optional<Tensor> workspace_, narrow_;
};

}  // namespace

std::unique_ptr<Sweep> make_cuda_sweep(const NetworkSpec& spec, ScalarType dtype) {
  FASTDNI_CHECK(spec.stages.size() < cuda::kSweepStages, "sweep: a CUDA plan must have fewer than ",
                cuda::kSweepStages, " stages, got ", spec.stages.size());
  FASTDNI_CHECK(spec.batch <= std::numeric_limits<int32_t>::max() - cuda::kSweepRows,
                "sweep: a CUDA plan must have fewer than 2^31 rows, got ", spec.batch);
  if (dtype == ScalarType::Double) return std::make_unique<CudaSweep<double>>(spec);
  return std::make_unique<CudaSweep<float>>(spec);
}

}  // namespace fastdni

#else

namespace fastdni {

std::unique_ptr<Sweep> make_cuda_sweep(const NetworkSpec&, ScalarType) {
  fail("sweep: this build has no CUDA kernels");
}

}  // namespace fastdni
#endif
