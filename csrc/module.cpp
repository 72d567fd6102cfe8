// What is not a tensor: how this extension was built, what the processor can do, which plan an op
// would launch. Importing the module also registers the ops under torch.ops.fastdni.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/names.h"
#include "cpu/kernels/isa.h"
#include "cpu/product.h"
#include "numbers.h"
#include "ops/sweep_binding.h"
#include "ops/sweep_plan.h"
#include "watch.h"
#if defined(FASTDNI_CUDA)
#include "cuda/kernels/regression_loss.h"
#endif

namespace py = pybind11;

namespace {

constexpr const char* kPlan = "sweep";

py::dict build_info() {
  py::dict info;
  info["version"] = FASTDNI_VERSION;
  info["compiler"] = FASTDNI_COMPILER;
  info["torch_headers"] = FASTDNI_TORCH_VERSION;
#if defined(FASTDNI_CUDA)
  info["cuda"] = FASTDNI_CUDA_VERSION;
  info["cuda_architectures"] = FASTDNI_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

fastdni::ScalarType dtype_named(const std::string& name) {
  using fastdni::ScalarType;
  return fastdni::named<ScalarType>(
      kPlan, "dtype", name, {{"float32", ScalarType::Float}, {"float64", ScalarType::Double}});
}

fastdni::SynthesizerSpec synthesizer_spec(const py::handle& object) {
  fastdni::SynthesizerSpec spec;
  if (object.is_none()) return spec;
  const auto given = py::cast<py::dict>(object);
  spec.widths = py::cast<std::vector<int64_t>>(given["widths"]);
  spec.bias = py::cast<bool>(given["bias"]);
  spec.context = py::cast<int64_t>(given["context"]);
  return spec;
}

fastdni::StageSpec stage_spec(const py::dict& given) {
  fastdni::StageSpec spec;
  spec.inputs = py::cast<int64_t>(given["inputs"]);
  spec.outputs = py::cast<int64_t>(given["outputs"]);
  spec.bias = py::cast<bool>(given["bias"]);
  spec.activation = fastdni::activation_named(kPlan, py::cast<std::string>(given["activation"]));
  spec.dropout = py::cast<bool>(given["dropout"]);
  if (!given["batch_norm"].is_none()) {
    const auto norm = py::cast<py::dict>(given["batch_norm"]);
    spec.batch_norm = true;
    spec.affine = py::cast<bool>(norm["affine"]);
    spec.running = py::cast<bool>(norm["running"]);
    spec.momentum = norm["momentum"].is_none() ? -1.0 : py::cast<double>(norm["momentum"]);
    spec.eps = py::cast<double>(norm["eps"]);
  }
  spec.synthesizer = synthesizer_spec(given["synthesizer"]);
  spec.input_synthesizer = synthesizer_spec(given["input_synthesizer"]);
  return spec;
}

py::dict numbers_of(const fastdni::SynthesizerParameters& numbers) {
  return py::dict(py::arg("weights") = numbers.weights, py::arg("biases") = numbers.biases,
                  py::arg("context_weight") = numbers.context_weight,
                  py::arg("context_bias") = numbers.context_bias);
}

py::dict numbers_of(const fastdni::StageParameters& numbers) {
  return py::dict(py::arg("weight") = numbers.weight, py::arg("bias") = numbers.bias,
                  py::arg("norm_weight") = numbers.norm_weight,
                  py::arg("norm_bias") = numbers.norm_bias, py::arg("running") = numbers.running,
                  py::arg("synthesizer") = numbers_of(numbers.synthesizer),
                  py::arg("input_synthesizer") = numbers_of(numbers.input_synthesizer));
}

// Owns a registered plan.
struct PlanHandle {
  std::shared_ptr<fastdni::Plan> plan;
  int64_t handle;
  int64_t workspace_bytes = 0;
  std::string launches;
  std::vector<int64_t> parameter_stages;
  py::list numbers;

  PlanHandle(const std::vector<py::dict>& stages, int64_t batch, const std::string& dtype,
             std::optional<int32_t> gpu, const std::string& criterion, bool input_gradient,
             const std::string& precision, bool separate_input, bool runs) {
    fastdni::NetworkSpec spec;
    for (const py::dict& stage : stages) spec.stages.push_back(stage_spec(stage));
    spec.batch = batch;
    spec.criterion = fastdni::criterion_named(kPlan, criterion);
    spec.input_gradient = input_gradient;
    spec.precision = fastdni::precision_named(kPlan, precision);
    spec.separate_input = separate_input;
    plan = fastdni::make_plan(std::move(spec), dtype_named(dtype), gpu, runs);
    if (runs) {
      workspace_bytes = plan->sweep->workspace_bytes();
      launches = plan->sweep->launches();
    }
    parameter_stages = plan->expected.parameter_stages;
    for (const auto& stage : plan->expected.stages) numbers.append(numbers_of(stage));
    handle = fastdni::register_plan(plan);
  }
  PlanHandle(const PlanHandle&) = delete;
  ~PlanHandle() { fastdni::forget_plan(handle); }
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastdni's compiled part: registers the ops, describes the build.";
  fastdni::cpu::active_isa();  // a bad FASTDNI_ISA fails the import, not the first op
  m.def("build_info", &build_info, "What the extension was built from and for.");
  m.def(
      "cpu_capability", [] { return fastdni::cpu::isa_name(fastdni::cpu::active_isa()); },
      "The instruction set whose kernels run: base, avx2 or avx512.");
  m.def("onednn_enabled", &fastdni::cpu::onednn_enabled,
        "Whether large float32 products go to oneDNN.");
  m.def("enable_onednn", &fastdni::cpu::enable_onednn, py::arg("enabled"),
        "Lets large float32 products go to oneDNN.");
  m.def(
      "product_library",
      [](int64_t rows, int64_t columns, int64_t depth) {
        using fastdni::cpu::Library;
        const auto library =
            fastdni::cpu::product_library(fastdni::ScalarType::Float, rows, columns, depth);
        if (library == Library::own) return "own";
        return library == Library::onednn ? "onednn" : "mkl";
      },
      py::arg("rows"), py::arg("columns"), py::arg("depth"),
      "Who makes a float32 (rows, depth) x (depth, columns) product: own, mkl or onednn.");
  py::class_<fastdni::Watch>(m, "Watch", "Notices that facts no longer hold.")
      .def(py::init<const py::list&>(), py::arg("facts"))
      .def_static(
          "joined",
          [](const std::vector<const fastdni::Watch*>& watches) {
            return std::make_unique<fastdni::Watch>(watches);
          },
          py::arg("watches"), "All facts of others, one after the other.")
      .def("unchanged", &fastdni::Watch::unchanged, "Whether all facts hold.");
  py::class_<fastdni::OptimizerNumbers>(m, "OptimizerNumbers",
                                        "Reads the numbers of torch.optim's groups.")
      .def(py::init<const py::list&>(), py::arg("groups"))
      .def("rows", &fastdni::OptimizerNumbers::rows, "The numbers of now, a row a group.")
      .def("rows_if_alike", &fastdni::OptimizerNumbers::rows_if_alike,
           "The same, or None where a group asks for another rule than at first.");
  py::class_<PlanHandle>(m, "SweepPlan",
                         "The memory and the program of a sweep; see csrc/ops/sweep_plan.h.")
      .def(py::init<const std::vector<py::dict>&, int64_t, const std::string&,
                    std::optional<int32_t>, const std::string&, bool, const std::string&, bool,
                    bool>(),
           py::kw_only(), py::arg("stages"), py::arg("batch"), py::arg("dtype"), py::arg("gpu"),
           py::arg("criterion"), py::arg("input_gradient"), py::arg("precision"),
           py::arg("separate_input"), py::arg("runs"))
      .def_readonly("handle", &PlanHandle::handle, "What the ops are given.")
      .def(
          "can_be_repeated",
          [](const PlanHandle& plan) { return fastdni::can_be_repeated(*plan.plan); },
          "Whether the last step's tensors are such as they were.")
      .def_property_readonly(
          "steps", [](const PlanHandle& plan) { return plan.plan->steps; },
          "Whole steps that were taken.")
      .def_readonly("parameter_stages", &PlanHandle::parameter_stages,
                    "For each parameter the stage whose mask it shares; a synthesizer shares that "
                    "above it.")
      .def_readonly(
          "numbers", &PlanHandle::numbers,
          "Of each stage the numbers of its parameters, and of its running mean among the "
          "statistics; -1 where there is none.")
      .def_readonly("launches", &PlanHandle::launches, "How a GPU's launches divide the step.")
      .def_readonly("workspace_bytes", &PlanHandle::workspace_bytes, "Memory that the plan holds.");
  m.def(
      "plan_results",
      [](int64_t handle) {
        const auto plan = fastdni::find_plan(handle);
        const fastdni::NetworkSpec& spec = plan->spec;
        int64_t boundaries = 0;
        for (const auto& stage : spec.stages) boundaries += stage.synthesizer.present();
        return py::make_tuple(spec.stages.back().outputs, boundaries, spec.unlocked(),
                              spec.input_gradient);
      },
      py::arg("handle"),
      "Of a plan's results: the output's width, the number of boundaries, whether there are losses "
      "of inputs, whether the gradient of x.");
#if defined(FASTDNI_CUDA)
  m.def(
      "cuda_versions",
      [] {
        int driver = 0, runtime = 0;
        cudaDriverGetVersion(&driver);
        cudaRuntimeGetVersion(&runtime);
        return std::pair(driver, runtime);
      },
      "The newest CUDA that the driver serves and that of the kernels, as 1000 major + 10 minor.");
  m.def(
      "regression_loss_plan",
      [](int64_t n) {
        const auto plan = fastdni::cuda::regression_loss_plan(n);
        return py::dict(py::arg("blocks") = plan.blocks, py::arg("threads") = plan.threads);
      },
      py::arg("n"), "The CUDA launch that regression_loss makes for n elements.");
#endif
}
