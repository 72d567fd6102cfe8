#include "cpu/kernels/synthesizer.h"

#include <limits>

namespace fastdni::cpu {

template <Isa isa, class T>
void finish_layer(const FinishLayer<T>& args, const RowChunks& chunks, int64_t first,
                  int64_t last) {
  using A = accumulate_t<T>;
  // Locals, so that the loop has nothing to reload.
  const int64_t columns = chunks.columns, end = chunks.end(last - 1);
  const T* __restrict__ bias = args.bias, * __restrict__ context_bias = args.context_bias;
  const A floor = args.relu ? A(0) : -std::numeric_limits<A>::infinity();
  for (int64_t row = chunks.begin(first); row < end; ++row) {
    T* __restrict__ y = args.y + row * columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      A value = y[c];
      if (bias) value += static_cast<A>(bias[c]);
      if (context_bias) value += static_cast<A>(context_bias[c]);
      y[c] = static_cast<T>(value < floor ? floor : value);  // NaN stays NaN, as in torch
    }
  }
}

template <Isa isa, class T, class Target>
void synthesis_error(const SynthesisError<T, Target>& args, const RowChunks& chunks, int64_t first,
                     int64_t last) {
  using A = accumulate_t<T>;
  const int64_t columns = chunks.columns;
  const A scale = args.scale;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    A* __restrict__ sums = args.column_sums + chunk * columns;
    for (int64_t c = 0; c < columns; ++c) sums[c] = 0;
    double squared = 0;
    const int64_t end = chunks.end(chunk);
    for (int64_t row = chunks.begin(chunk); row < end; ++row) {
      const T* __restrict__ prediction = args.prediction + row * columns;
      const Target* __restrict__ target = args.target + row * columns;
      T* __restrict__ grad = args.grad + row * columns;
      A row_squared = 0;
#pragma omp simd reduction(+ : row_squared)
      for (int64_t c = 0; c < columns; ++c) {
        const A e = static_cast<A>(prediction[c]) - static_cast<A>(target[c]);
        const A scaled = scale * e;
        row_squared += e * e;
        sums[c] += scaled;
        grad[c] = static_cast<T>(scaled);
      }
      squared += row_squared;
      if (args.error == nullptr) continue;
      A* __restrict__ error = args.error + row * columns;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        error[c] = static_cast<A>(prediction[c]) - static_cast<A>(target[c]);
      }
    }
    args.squared[chunk] = squared;
  }
}

template <Isa isa, class T>
void relu_backward(const ReluBackward<T>& args, const RowChunks& chunks, int64_t first,
                   int64_t last) {
  using A = accumulate_t<T>;
  const int64_t columns = chunks.columns;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    A* __restrict__ sums = args.column_sums + chunk * columns;
    for (int64_t c = 0; c < columns; ++c) sums[c] = 0;
    const int64_t end = chunks.end(chunk);
    for (int64_t row = chunks.begin(chunk); row < end; ++row) {
      T* __restrict__ grad = args.grad + row * columns;
      const T* __restrict__ hidden = args.hidden + row * columns;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) {
        // Written so that a NaN in hidden lets the gradient through, as in torch.
        const A masked = static_cast<A>(hidden[c]) <= 0 ? A(0) : static_cast<A>(grad[c]);
        sums[c] += masked;
        grad[c] = static_cast<T>(masked);
      }
    }
  }
}

namespace {

template <class Sum, class T>
void add_chunks_in(const accumulate_t<T>* column_sums, T* sum, const RowChunks& chunks) {
  const int64_t columns = chunks.columns;
  const int64_t count = chunks.count();
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) {
    Sum total = 0;
    for (int64_t chunk = 0; chunk < count; ++chunk) total += column_sums[chunk * columns + c];
    sum[c] = static_cast<T>(static_cast<accumulate_t<T>>(total));
  }
}

}  // namespace

template <Isa isa, class T>
void add_chunks(const accumulate_t<T>* column_sums, T* sum, const RowChunks& chunks) {
  if (chunks.count() <= RowChunks::kFew) {
    add_chunks_in<accumulate_t<T>>(column_sums, sum, chunks);
  } else {
    add_chunks_in<double>(column_sums, sum, chunks);
  }
}

#define INSTANTIATE_ERROR(T, Target)                                                           \
  template void synthesis_error<Isa::FASTDNI_ISA, T, Target>(const SynthesisError<T, Target>&, \
                                                             const RowChunks&, int64_t, int64_t);
#define INSTANTIATE(T)                                                                       \
  INSTANTIATE_ERROR(T, T)                                                                    \
  template void finish_layer<Isa::FASTDNI_ISA, T>(const FinishLayer<T>&, const RowChunks&,   \
                                                  int64_t, int64_t);                         \
  template void relu_backward<Isa::FASTDNI_ISA, T>(const ReluBackward<T>&, const RowChunks&, \
                                                   int64_t, int64_t);                        \
  template void add_chunks<Isa::FASTDNI_ISA, T>(const accumulate_t<T>*, T*, const RowChunks&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(bfloat16)
INSTANTIATE_ERROR(bfloat16, float)

}  // namespace fastdni::cpu
