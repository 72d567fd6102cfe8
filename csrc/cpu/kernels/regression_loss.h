// error = prediction - target; loss = sum(error^2) / divisor
#pragma once
#include <cstdint>

#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastdni::cpu {

template <class T>
struct RegressionLoss {
  const T* prediction;     // (n,)
  const T* target;         // (n,)
  accumulate_t<T>* error;  // (n,)
  double* partials;        // (chunks,) the squared error of each chunk
  int64_t n;
};

// A chunk is a fixed number of elements, so that the order of the sum, and with it the last bit of
// the loss, does not depend on the number of threads.
constexpr int64_t kRegressionLossChunk = 4096;

template <Isa isa, class T>
void regression_loss_chunks(const RegressionLoss<T>& args, int64_t first, int64_t last);

}  // namespace fastdni::cpu
