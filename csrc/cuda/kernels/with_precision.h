// From the precision of products to the kernels made for it.
#pragma once
#include <cuda_runtime_api.h>

#include <type_traits>

#include "common/network.h"

namespace fastdni::cuda {

// Calls body with the kernels' template argument. float64, which is for proofs, has no tensor
// cores.
template <class T, class Body>
cudaError_t with_precision(Precision precision, const Body& body) {
  const auto call = [&]<Precision kind>() {
    return body(std::integral_constant<Precision, kind>{});
  };
  if (precision == Precision::bfloat16) return call.template operator()<Precision::bfloat16>();
  if constexpr (std::is_same_v<T, float>) {
    if (precision == Precision::tf32) return call.template operator()<Precision::tf32>();
    if (precision == Precision::tf32x3) return call.template operator()<Precision::tf32x3>();
  }
  return call.template operator()<Precision::exact>();
}

}  // namespace fastdni::cuda
