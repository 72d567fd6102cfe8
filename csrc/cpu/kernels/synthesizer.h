// What a synthesizer does between its matrix products, fused into one pass over each matrix.
//
// Rows are cut into chunks, and column sums are formed per chunk and then over the chunks in order,
// of more than kFew in double: results do not depend on the number of threads, and however many
// rows there are no more is lost than by torch's own sums.
#pragma once
#include <cstdint>

#include "common/scalar.h"
#include "cpu/isa.h"

namespace fastdni::cpu {

struct RowChunks {
  int64_t rows, columns;

  static constexpr int64_t kRows = 16, kFew = 16;

  int64_t count() const { return (rows + kRows - 1) / kRows; }
  int64_t begin(int64_t chunk) const { return chunk * kRows; }
  int64_t end(int64_t chunk) const {
    const int64_t next = begin(chunk) + kRows;
    return next < rows ? next : rows;
  }
};

// y = phi(y + bias + context_bias), in place; phi is ReLU or the identity.
template <class T>
struct FinishLayer {
  T* y;                   // (rows, columns)
  const T* bias;          // (columns,) or null
  const T* context_bias;  // (columns,) or null
  bool relu;
};

// e = prediction - target; grad = scale e; also the sum of e^2 and the column sums of scale e.
// Target is T or accumulate_t<T>: a float32 gradient meets a bfloat16 prediction without rounding.
template <class T, class Target>
struct SynthesisError {
  const T* prediction;           // (rows, columns)
  const Target* target;          // (rows, columns)
  T* grad;                       // (rows, columns)
  accumulate_t<T>* error;        // (rows, columns), e itself; or null
  double* squared;               // (chunks,)
  accumulate_t<T>* column_sums;  // (chunks, columns)
  accumulate_t<T> scale;
};

// grad = grad * (hidden > 0), in place; also its column sums.
template <class T>
struct ReluBackward {
  T* grad;                       // (rows, columns)
  const T* hidden;               // (rows, columns) after the ReLU
  accumulate_t<T>* column_sums;  // (chunks, columns)
};

template <Isa isa, class T>
void finish_layer(const FinishLayer<T>& args, const RowChunks& chunks, int64_t first, int64_t last);

template <Isa isa, class T, class Target>
void synthesis_error(const SynthesisError<T, Target>& args, const RowChunks& chunks, int64_t first,
                     int64_t last);

template <Isa isa, class T>
void relu_backward(const ReluBackward<T>& args, const RowChunks& chunks, int64_t first,
                   int64_t last);

// sum[c] = the sum of column_sums[chunk, c] over the chunks, in their order.
template <Isa isa, class T>
void add_chunks(const accumulate_t<T>* column_sums, T* sum, const RowChunks& chunks);

}  // namespace fastdni::cpu
