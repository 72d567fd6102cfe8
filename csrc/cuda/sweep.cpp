// The sweep on a GPU: the program of csrc/cuda/kernels/sweep_program.h, its tables in device
// memory, and a step's pointers.
#include "cuda/kernels/sweep.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <optional>

#include "cuda/device.h"
#include "cuda/kernels/sweep_builder.h"
#include "cuda/library_product.h"
#include "cuda/parameters.h"
#include "ops/sweep.h"
#include "ops/sweep_plan.h"

namespace fastdni::cuda {
namespace {

constexpr const char* kOp = "sweep";
// Wider layers have enough columns to give every multiprocessor a tile of one phase; below,
// launches cost more than idle multiprocessors do. A block makes the tiles of its rows one after
// the other, a cluster all at a time. Estimated, not measured.
constexpr int64_t kWidestForClusters = kSweepCluster * kSweepColumns;
constexpr int64_t kWidestForRows = 256;
// Streams that a plan keeps memory for.
constexpr size_t kMostStreams = 4;

// Tables in one piece, to be.
class Tables {
 public:
  // Places elements behind what is there; returns their offset.
  template <class Element>
  size_t add(const std::vector<Element>& elements) {
    const size_t offset = (bytes_.size() + 15) / 16 * 16;
    bytes_.resize(offset + elements.size() * sizeof(Element));
    std::memcpy(bytes_.data() + offset, elements.data(), bytes_.size() - offset);
    return offset;
  }
  const std::byte* data() const { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }

 private:
  std::vector<std::byte> bytes_;
};

// Tables in device memory. What a graph reads is never written again.
class DeviceTables {
 public:
  void upload(const Tables& tables, const Tensor& like, bool in_graph, cudaStream_t stream) {
    if (in_graph_ || capacity_ < tables.size()) {
      if (memory_) left_to_graphs_.push_back(*std::move(memory_));
      memory_ = empty(like, {static_cast<int64_t>(tables.size())}, aoti_torch_dtype_uint8());
      capacity_ = tables.size();
    }
    check(kOp, launch_sweep_write(memory_->data_ptr(), tables.data(), tables.size(), stream));
    is_there_ = !in_graph;  // then each replay writes it, and nothing does now
    in_graph_ = in_graph;
  }
  // To be called in front of a step: whether there is nothing to upload.
  bool is_there(bool in_graph) {
    in_graph_ |= in_graph;
    return is_there_;
  }
  template <class Element>
  Element* at(size_t offset) const {
    return reinterpret_cast<Element*>(static_cast<std::byte*>(memory_->data_ptr()) + offset);
  }

 private:
  bool is_there_ = false, in_graph_ = false;
  std::optional<Tensor> memory_;
  std::vector<Tensor> left_to_graphs_;
  size_t capacity_ = 0;
};

template <class T>
class CudaSweep final : public Sweep {
 public:
  explicit CudaSweep(const NetworkSpec& spec)
      : spec_(spec), program_(make_sweep_program(spec, library_from(spec))) {
    const std::vector<Task> tasks = sweep_tasks(program_);
    task_count_ = static_cast<int32_t>(tasks.size());
    instructions_ = fixed_.add(program_.instructions);
    reductions_ = fixed_.add(program_.reductions);
    jobs_ = fixed_.add(program_.jobs);
    tasks_ = fixed_.add(tasks);
    losses_ = fixed_.add(program_.synthesis);
    for (const Instruction& op : program_.instructions) {
      widest_ = std::max<int64_t>(widest_, op.columns);
    }
    const int cluster = sweep_cluster(program_);
    const bool clusters =
        cluster > 1 && widest_ <= kWidestForClusters && sweep_clusters<T>(spec.precision, cluster);
    spread_ = clusters                    ? Spread::clusters
              : widest_ <= kWidestForRows ? Spread::rows
                                          : Spread::phases;
    if (!program_.library.empty()) spread_ = Spread::phases;
  }

  std::string launches() const override {
    const std::string phases = std::to_string(program_.phases) + " phases";
    std::string text = "a block for 16 rows, " + phases;
    if (spread_ == Spread::clusters) {
      const std::string blocks = std::to_string(sweep_cluster(program_));
      text = "a cluster of " + blocks + " blocks for 16 rows, " + phases;
    }
    if (spread_ == Spread::phases) {
      text =
          "a launch for each of " + phases + ", layers up to " + std::to_string(widest_) + " wide";
    }
    const size_t products = program_.library.size() + program_.gradients.size();
    if (products == 0) return text;
    text += "; " + std::to_string(products) + " products, from " +
            std::to_string(library_from(spec_)) + " multiply-adds on";
    if (spec_.batch >= kLongBatch) {
      text += " or over " + std::to_string(kLongBatch) + " rows";
    }
    return text + ", by torch's library";
  }

  int64_t workspace_bytes() const override { return program_.workspace * sizeof(T); }

  void forward(const StepMemory& memory) override {
    const OnDevice device(*memory.like);
    stream_ = device.stream();
    own_ = &memory_of(stream_);
    step_ = begin(memory, !memory.apart);
    check(kOp, launch_sweep_forward(step_, program_, spread_, library(memory), stream_));
    if (memory.apart && step_.loss != nullptr) {
      check(kOp, launch_sweep_loss(step_, stream_));
    }
  }

  void update(const StepMemory& memory) override {
    const OnDevice device(*memory.like);
    if (memory.apart) {
      FASTDNI_CHECK(device.stream() == stream_, kOp,
                    ": an update must run in the stream of its forward part");
      step_ = begin(memory, true);
      step_.loss = nullptr;  // it is there since `forward`
    }
    if (memory.gradient != nullptr) {
      check(kOp, launch_sweep_regression(step_, program_, spread_, library(memory), stream_));
    }
    check(kOp, launch_sweep_update(step_, program_, library(memory), stream_));
  }

 private:
  static int64_t library_from(const NetworkSpec& spec) {
    return cuda::library_from(spec.precision, sizeof(T) == sizeof(double), kOnHost);
  }

  Library library(const StepMemory& memory) {
    return [&memory, this](const LibraryProduct& product) {
      const auto at = [&](const Operand& operand) -> void* {
        if (operand.place == Place::parameter) return memory.parameters[operand.at].value;
        return resolve(step_, operand);
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
      if (spec_.precision != Precision::bfloat16) return library_product(*memory.like, out, a, b);
      std::optional<Tensor>& narrow = own_->narrow;
      if (!narrow) narrow = empty(*memory.like, {narrow_elements()}, aoti_torch_dtype_bfloat16());
      library_product_bfloat16(*memory.like, out, a, b, narrow->data_ptr());
    };
  }

  // Whether the library's product is the weight's whole update: w -= lr grad^T input.
  bool is_folded(const ParameterMemory& parameter) const {
    const OptimizerSettings& s = parameter.settings;
    return s.rule == Rule::sgd && s.weight_decay == 0 && parameter.device_lr.at == nullptr &&
           spec_.precision != Precision::bfloat16;
  }

  // Of the two operands of the library's products, at most.
  int64_t narrow_elements() const {
    int64_t most = 0;
    for (const auto* products : {&program_.library, &program_.gradients}) {
      for (const LibraryProduct& p : *products) {
        most = std::max(most, p.depth * (p.rows + p.columns));
      }
    }
    return most;
  }

  // `prepares`: whether some numbers are the GPU's own.
  std::vector<SweepParameter<T>> parameters_of(const StepMemory& memory, bool* prepares) const {
    std::vector<SweepParameter<T>> parameters(memory.parameters.size());
    for (size_t i = 0; i < parameters.size(); ++i) {
      parameters[i] = parameter_of<T>(memory.parameters[i]);
      *prepares |= is_prepared_there(parameters[i]);
    }
    for (const LibraryProduct& gradient : program_.gradients) {
      const auto number = static_cast<size_t>(gradient.parameter);
      if (is_folded(memory.parameters[number])) parameters[number].update.rule = Rule::none;
    }
    return parameters;
  }

  // The tables on the device, and everything the kernels are told. `updates`: whether an update
  // follows, by the optimizers' settings as they are now.
  SweepStep<T> begin(const StepMemory& memory, bool updates) {
    const Tensor& like = *memory.like;
    if (!own_->workspace) own_->workspace = empty(like, {program_.workspace});
    const bool in_graph = is_captured(kOp, stream_);
    own_->in_graph |= in_graph;
    DeviceTables& fixed = own_->fixed;
    if (!fixed.is_there(in_graph)) fixed.upload(fixed_, like, in_graph, stream_);

    bool prepares = false;
    std::vector<SweepParameter<T>> parameters = parameters_of(memory, &prepares);
    if (in_graph && updates) {
      for (const ParameterMemory& parameter : memory.parameters) {
        check_count_in_graph(kOp, parameter);
      }
    }
    // Uploaded anew when something is another than in the step before.
    DeviceTables& of_step = own_->of_step;
    if (!of_step.is_there(in_graph) || parameters != own_->parameters ||
        memory.statistics != own_->statistics) {
      Tables tables;
      of_parameters_ = tables.add(parameters);
      of_statistics_ = tables.add(memory.statistics);
      of_step.upload(tables, like, in_graph, stream_);
      own_->parameters = std::move(parameters);
      own_->statistics = memory.statistics;
    }

    SweepStep<T> step{};
    step.instructions = fixed.template at<Instruction>(instructions_);
    step.reductions = fixed.template at<Reduction>(reductions_);
    step.jobs = fixed.template at<Job>(jobs_);
    step.tasks = fixed.template at<Task>(tasks_);
    step.losses = fixed.template at<Loss>(losses_);
    step.task_count = task_count_;
    step.bias_task_count = static_cast<int32_t>(sweep_bias_tasks(program_));
    step.loss_count = static_cast<int32_t>(program_.synthesis.size());
    step.criterion_loss = program_.criterion;
    step.label_counts = program_.label_counts;
    step.workspace = static_cast<T*>(own_->workspace->data_ptr());
    step.parameters = of_step.template at<SweepParameter<T>>(of_parameters_);
    step.parameter_count = static_cast<int32_t>(own_->parameters.size());
    step.prepares = prepares;
    step.statistics = of_step.template at<void*>(of_statistics_);
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
    step.scale = static_cast<T>(2 / step.divisor);
    step.outputs = static_cast<int32_t>(spec_.stages.back().outputs);
    step.criterion = spec_.criterion;
    step.precision = spec_.precision;
    return step;
  }

  // What steps in one stream have of the device. Allocated and used there alone, so that it may be
  // given back while the stream still works on it, and steps in two streams do not meet.
  struct StreamMemory {
    bool in_graph = false;  // some graph reads and writes it
    DeviceTables fixed, of_step;
    std::optional<Tensor> workspace, narrow;
    std::vector<SweepParameter<T>> parameters;  // those in `of_step`
    std::vector<void*> statistics;
  };

  StreamMemory& memory_of(cudaStream_t stream) {
    const auto found = of_stream_.find(stream);
    if (found != of_stream_.end()) return found->second;
    // A loop over fresh streams is not to hold memory for all of them.
    if (of_stream_.size() >= kMostStreams) {
      std::erase_if(of_stream_, [](const auto& entry) { return !entry.second.in_graph; });
    }
    return of_stream_[stream];
  }

  NetworkSpec spec_;
  SweepProgram program_;
  int32_t task_count_;
  int64_t widest_ = 0;
  Spread spread_;
  Tables fixed_;
  std::map<cudaStream_t, StreamMemory> of_stream_;
  // Of the step at work.
  cudaStream_t stream_ = nullptr;
  StreamMemory* own_ = nullptr;  // the stream's
  SweepStep<T> step_{};
  size_t of_parameters_ = 0, of_statistics_ = 0;  // in the tables of a step
  size_t instructions_, reductions_, jobs_, tasks_, losses_;
};

std::unique_ptr<Sweep> make_sweep(const NetworkSpec& spec, ScalarType dtype) {
  FASTDNI_CHECK(spec.stages.size() < kSweepStages, "sweep: a CUDA plan must have fewer than ",
                kSweepStages, " stages, got ", spec.stages.size());
  FASTDNI_CHECK(spec.batch <= std::numeric_limits<int32_t>::max() - kSweepRows,
                "sweep: a CUDA plan must have fewer than 2^31 rows, got ", spec.batch);
  if (dtype == ScalarType::Double) return std::make_unique<CudaSweep<double>>(spec);
  return std::make_unique<CudaSweep<float>>(spec);
}

const SweepBackend backend(kOnHost ? Device::cpu : Device::gpu, &make_sweep);

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdni, FASTDNI_CUDA_KEY, m) { implement_sweep(m); }

}  // namespace fastdni::cuda
