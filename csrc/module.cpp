// What is not a tensor: how this extension was built, what the processor can do, which plan an op
// would launch. Importing the module also registers the ops under torch.ops.fastdni.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "ops/product.h"
#if defined(FASTDNI_CUDA)
#include "cuda/regression_loss.h"
#endif

namespace py = pybind11;

namespace {

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
        return library == Library::onednn ? "onednn" : "mkl";
      },
      py::arg("rows"), py::arg("columns"), py::arg("depth"),
      "The library that a float32 (rows, depth) x (depth, columns) product goes to.");
#if defined(FASTDNI_CUDA)
  m.def(
      "regression_loss_plan",
      [](int64_t n) {
        const auto plan = fastdni::cuda::regression_loss_plan(n);
        return py::dict(py::arg("blocks") = plan.blocks, py::arg("threads") = plan.threads);
      },
      py::arg("n"), "The CUDA launch that regression_loss makes for n elements.");
#endif
}
