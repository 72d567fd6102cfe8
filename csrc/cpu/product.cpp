#include "cpu/product.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cstring>

#include "cpu/kernels/multiply.h"
#include "cpu/scratch.h"

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

// Up to this many multiply-adds no library is called: square products take as long either way,
// narrow ones (a head of few classes, a context) less. See benchmarks/results/notes.md.
constexpr int64_t kOwnUpTo = int64_t{1} << 19;

// out = a b
template <Isa isa, class T>
void own_product(Strided<T> a, const Strided<T>& b, int64_t m, int64_t n, int64_t k, T* out) {
  const int64_t columns = padded<isa, T>(n), last = panels<isa, T>(n);
  const int64_t read = a.row != 1 ? 0 : k * a.column + m + kOverread / int64_t{sizeof(T)};
  const Scratch<T> memory(k * columns + m * columns + read);
  T *packed = memory.data(), *wide = packed + k * columns, *copy = wide + m * columns;
  if (read > 0) {  // a transposed one is read beyond its end
    std::memcpy(copy, a.data, ((k - 1) * a.column + m) * sizeof(T));
    a.data = copy;
  }
  pack<isa, T>(b, k, n, 0, last, false, packed);
  const bool whole = columns == n;
  for (int64_t r = 0; r < m; r += kMultiplyRows) {
    const int64_t count = std::min(kMultiplyRows, m - r);
    multiply<isa, T>(a.from(r, 0), packed, count, k, 0, last, false, false,
                     (whole ? out : wide) + r * columns, columns);
  }
  for (int64_t r = 0; !whole && r < m; ++r) {
    std::memcpy(out + r * n, wide + r * columns, n * sizeof(T));
  }
}

template <class T>
Strided<T> strided(const Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0), tensor.stride(1)};
}

}  // namespace

void enable_onednn(bool enabled) {
  use_onednn = enabled && aoti_torch_cpu__linear_pointwise != nullptr;
}

bool onednn_enabled() { return use_onednn; }

Library product_library(ScalarType dtype, int64_t m, int64_t n, int64_t k) {
  // float64 has no oneDNN product, and torch's own bfloat16 product is oneDNN's already.
  static const int64_t from = onednn_from();
  const int64_t work = m * n * k;
  if (work > 0 && work <= kOwnUpTo && dtype != ScalarType::BFloat16) return Library::own;
  return use_onednn && work >= from && dtype == ScalarType::Float ? Library::onednn : Library::mkl;
}

Tensor product(const Tensor& a, const Tensor& b) {
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  const Library library = product_library(a.scalar_type(), m, n, k);
  if (library == Library::onednn) {
    AtenTensorHandle result;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(a.get(), b.get(), nullptr, "none",
                                                            nullptr, 0, nullptr, &result));
    return Tensor(result);
  }
  Tensor out = empty(a, {m, n});
  if (library == Library::own && (a.stride(0) == 1 || a.stride(1) == 1)) {
    const auto run = [&](auto scalar) {
      using T = decltype(scalar);
      with_isa([&](auto isa) {
        own_product<isa.value, T>(strided<T>(a), strided<T>(b).transposed(), m, n, k,
                                  mutable_data<T>(out));
      });
    };
    a.scalar_type() == ScalarType::Float ? run(float{}) : run(double{});
    return out;
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), transposed(b).get()));
  return out;
}

Tensor weight_gradient(const Tensor& grad, const Tensor& x) {
  // A narrow x (a context) is slow as the right-hand side: 100 us against 22 for (256, 256)^T times
  // (256, 10). Its transpose is worth the small copy that puts the result right.
  const int64_t rows = grad.size(0), n = grad.size(1), k = x.size(1);
  if (k * 4 <= n && product_library(grad.scalar_type(), n, k, rows) != Library::own) {
    return as_contiguous(transposed(product(transposed(x), transposed(grad))));
  }
  return product(transposed(grad), transposed(x));
}

void add_product(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), transposed(b).get(), 1.0, 1.0));
}

}  // namespace fastdni::cpu
