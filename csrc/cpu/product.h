// Matrix products on the CPU: small ones by the kernels of multiply.h, others through whichever of
// torch's libraries is faster for the size.
#pragma once
#include "ops/tensor.h"

namespace fastdni::cpu {

enum class Library { own, mkl, onednn };

// Who makes an (m, k) x (k, n) product: as was measured, see benchmarks/results/notes.md.
Library product_library(ScalarType dtype, int64_t m, int64_t n, int64_t k);

// oneDNN's product is a private op of torch: Python looks at its schema when fastdni is imported
// and calls enable_onednn if it is the one that this file was written for. Until then MKL does all.
void enable_onednn(bool enabled);
bool onednn_enabled();

// a (m, k) times b (n, k)^T -> (m, n), fresh. Both may be transposed views.
Tensor product(const Tensor& a, const Tensor& b);

// grad (m, n) and x (m, k) -> grad^T x (n, k), fresh: the gradient of a weight.
Tensor weight_gradient(const Tensor& grad, const Tensor& x);

// out (m, n) += a (m, k) b (n, k)^T
void add_product(const Tensor& out, const Tensor& a, const Tensor& b);

}  // namespace fastdni::cpu
