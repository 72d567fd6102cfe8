// From the arithmetic of products to the kernels made for it.
#pragma once
#include <cuda_runtime_api.h>

#include <type_traits>

#include "common/network.h"

namespace fastdni::cuda {

// Calls body with the kernels' template argument. float64, which is for proofs, has no tensor
// cores.
template <class T, class Body>
cudaError_t with_products(Products products, const Body& body) {
  const auto call = [&]<Products kind>() { return body(std::integral_constant<Products, kind>{}); };
  if (products == Products::bfloat16) return call.template operator()<Products::bfloat16>();
  if constexpr (std::is_same_v<T, float>) {
    if (products == Products::tf32) return call.template operator()<Products::tf32>();
    if (products == Products::tf32x3) return call.template operator()<Products::tf32x3>();
  }
  return call.template operator()<Products::exact>();
}

}  // namespace fastdni::cuda
