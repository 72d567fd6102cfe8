#include "cpu/kernels/regression_loss.h"

namespace fastdni::cpu {

template <Isa isa, class T>
void regression_loss_chunks(const RegressionLoss<T>& args, int64_t first, int64_t last) {
  using A = accumulate_t<T>;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    const int64_t begin = chunk * kRegressionLossChunk;
    const int64_t end =
        begin + kRegressionLossChunk < args.n ? begin + kRegressionLossChunk : args.n;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) {
      const A error = static_cast<A>(args.prediction[i]) - static_cast<A>(args.target[i]);
      args.error[i] = error;
      sum += static_cast<double>(error) * error;
    }
    args.partials[chunk] = sum;
  }
}

#define INSTANTIATE(T)                                                                         \
  template void regression_loss_chunks<Isa::FASTDNI_ISA, T>(const RegressionLoss<T>&, int64_t, \
                                                            int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bfloat16)

}  // namespace fastdni::cpu
