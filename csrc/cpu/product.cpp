#include "cpu/product.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

// Weak: a torch built without oneDNN does not export it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attribute,
    const double** scalars, int64_t num_scalars, const char** algorithm, AtenTensorHandle* result);

namespace fastdni::cpu {
namespace {

bool use_onednn = false;

// From this many multiply-adds on, oneDNN's float32 product is taken for the faster one. Zen 4,
// which splits a 512-bit operation in two, was measured with benchmarks/products.py: both libraries
// reach the same peak, and oneDNN's larger start-up cost is earned from 256 x 784 x 256 on. For
// processors that run AVX-512 at full width the figure is another machine's, where oneDNN won by
// 1.6 at 64 x 256 x 256; see benchmarks/results/notes.md.
constexpr int64_t kOneDnnFromFullWidth = int64_t{1} << 22;
constexpr int64_t kOneDnnFromHalfWidth = int64_t{1} << 25;

int64_t onednn_from() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Among AMD's, the processors with VP2INTERSECT (Zen 5 on) have the full width.
  const bool full_width =
      __builtin_cpu_supports("avx512f") &&
      (!__builtin_cpu_is("amd") || __builtin_cpu_supports("avx512vp2intersect"));
  if (full_width) return kOneDnnFromFullWidth;
#endif
  return kOneDnnFromHalfWidth;
}

}  // namespace

void enable_onednn(bool enabled) {
  use_onednn = enabled && aoti_torch_cpu__linear_pointwise != nullptr;
}

bool onednn_enabled() { return use_onednn; }

Library product_library(ScalarType dtype, int64_t m, int64_t n, int64_t k) {
  // float64 has no oneDNN product, and torch's own bfloat16 product is oneDNN's already.
  static const int64_t from = onednn_from();
  const bool large = m * n * k >= from;
  return use_onednn && large && dtype == ScalarType::Float ? Library::onednn : Library::mkl;
}

Tensor product(const Tensor& a, const Tensor& b) {
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  if (product_library(a.scalar_type(), m, n, k) == Library::onednn) {
    AtenTensorHandle result;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(a.get(), b.get(), nullptr, "none",
                                                            nullptr, 0, nullptr, &result));
    return Tensor(result);
  }
  Tensor out = empty(a, {m, n});
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), transposed(b).get()));
  return out;
}

Tensor weight_gradient(const Tensor& grad, const Tensor& x) {
  // A narrow x (a context) is slow as the right-hand side: 100 us against 22 for (256, 256)^T times
  // (256, 10). Its transpose is worth the small copy that puts the result right.
  if (x.size(1) * 4 <= grad.size(1)) {
    return as_contiguous(transposed(product(transposed(x), transposed(grad))));
  }
  return product(transposed(grad), transposed(x));
}

void add_product(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), transposed(b).get(), 1.0, 1.0));
}

}  // namespace fastdni::cpu
