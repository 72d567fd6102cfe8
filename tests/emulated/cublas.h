// Part of runtime.cpp: cuBLAS, as far as torch's products for fastdni's ops need it. Matrices lie
// by columns. Its own header would need more of a toolkit.
#pragma once
#include <library_types.h>

#include "streams.h"

// In no anonymous namespace: a function that takes them would not be exported.
using Handle = cudaStream_t*;
enum Status { kSuccess = 0, kExecutionFailed = 13, kNotSupported = 15 };
enum Operation { kPlain = 0 };  // others: transposed

namespace {

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

template <class Sum, class In>
Status multiply(Handle handle, Operation of_a, Operation of_b, int m, int n, int k,
                const Sum* alpha, const In* a, int64_t lda, const In* b, int64_t ldb,
                const Sum* beta, Sum* c, int64_t ldc) {
  const auto at = [](Operation as, int64_t row, int64_t column, int64_t leading) {
    return as == kPlain ? row + column * leading : column + row * leading;
  };
  ++counts["launches"];
  const auto work = [=, scale = *alpha, kept = *beta] {
    for (int column = 0; column < n; ++column) {
      for (int row = 0; row < m; ++row) {
        Sum sum = 0;
        for (int d = 0; d < k; ++d) {
          sum += static_cast<Sum>(a[at(of_a, row, d, lda)]) *
                 static_cast<Sum>(b[at(of_b, d, column, ldb)]);
        }
        Sum& out = c[row + column * ldc];
        out = scale * sum + (kept == 0 ? 0 : kept * out);
      }
    }
  };
  return send(*handle, work) == cudaSuccess ? kSuccess : kExecutionFailed;
}

}  // namespace

EXPORT Status cublasCreate_v2(Handle* handle) { return *handle = new cudaStream_t{}, kSuccess; }
EXPORT Status cublasDestroy_v2(Handle handle) { return delete handle, kSuccess; }
EXPORT Status cublasSetStream_v2(Handle handle, cudaStream_t stream) {
  return *handle = stream, kSuccess;
}
EXPORT Status cublasSetWorkspace_v2(Handle, void*, size_t) { return kSuccess; }
EXPORT Status cublasSetPointerMode_v2(Handle, int) { return kSuccess; }
EXPORT Status cublasGetPointerMode_v2(Handle, int* mode) { return *mode = 0, kSuccess; }
EXPORT Status cublasSetMathMode(Handle, int) { return kSuccess; }
EXPORT Status cublasGetMathMode(Handle, int* mode) { return *mode = 0, kSuccess; }
EXPORT Status cublasSetSmCountTarget(Handle, int) { return kSuccess; }
EXPORT Status cublasSgemm_v2(Handle handle, Operation of_a, Operation of_b, int m, int n, int k,
                             const float* alpha, const float* a, int lda, const float* b, int ldb,
                             const float* beta, float* c, int ldc) {
  return multiply(handle, of_a, of_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
EXPORT Status cublasDgemm_v2(Handle handle, Operation of_a, Operation of_b, int m, int n, int k,
                             const double* alpha, const double* a, int lda, const double* b,
                             int ldb, const double* beta, double* c, int ldc) {
  return multiply(handle, of_a, of_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
EXPORT Status cublasGemmEx(Handle handle, Operation of_a, Operation of_b, int m, int n, int k,
                           const float* alpha, const void* a, cudaDataType of_in, int lda,
                           const void* b, cudaDataType, int ldb, const float* beta, float* c,
                           cudaDataType of_out, int ldc, int /*compute type*/, int /*algorithm*/) {
  const auto in = [&]<class In>(const In* left) {
    return multiply(handle, of_a, of_b, m, n, k, alpha, left, lda, static_cast<const In*>(b), ldb,
                    beta, c, ldc);
  };
  if (of_out != CUDA_R_32F) return kNotSupported;
  if (of_in == CUDA_R_32F) return in(static_cast<const float*>(a));
  if (of_in == CUDA_R_16BF) return in(static_cast<const BFloat16*>(a));
  return kNotSupported;
}
