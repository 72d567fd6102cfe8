// Matrix products by torch's own library on any device, between matrices in memory that others own.
#pragma once
#include "ops/tensor.h"

namespace fastdni {

// A matrix on the device of `like`; `transposed`: it lies in memory as (columns, rows).
struct MatrixAt {
  void* data;
  int64_t rows, columns;
  bool transposed;
};

// out = a b, in the dtype of `like`. TF32 as torch's settings say.
void library_product(const Tensor& like, const MatrixAt& out, const MatrixAt& a, const MatrixAt& b);

// out += scale a b
void add_library_product(const Tensor& like, const MatrixAt& out, const MatrixAt& a,
                         const MatrixAt& b, double scale);

// out = a b with operands rounded to bfloat16 (in `scratch`, as many elements as both have) and
// sums in float32; on a GPU only.
void library_product_bfloat16(const Tensor& like, const MatrixAt& out, const MatrixAt& a,
                              const MatrixAt& b, void* scratch);

}  // namespace fastdni
