// What a step does between its matrix products: one pass over a block of rows each.
//
// Letters are those of fastdni/reference/sweep.py. A matrix has `columns` columns and lies in rows
// of `stride` elements. Sums over the batch are left per block of rows, for whoever adds the blocks
// up in their order: no result depends on the number of threads.
#pragma once
#include <cstdint>

#include "common/activation.h"
#include "common/network.h"
#include "common/optimizer.h"
#include "cpu/kernels/isa.h"

namespace fastdni::cpu {

struct Rows {
  int64_t begin, end;
};

template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t columns = 0, stride = 0;

  T* row(int64_t r) const { return data + r * stride; }
  operator Matrix<const T>() const { return {data, columns, stride}; }
};

// z = phi(z + b), in place; b may be null.
template <Isa isa, class T>
void finish_rows(Matrix<T> z, const T* bias, const T* second_bias, Activation activation,
                 Rows rows);

// du = grad * phi'(u), from h = phi(u); grad and du may be one matrix.
template <Isa isa, class T>
void activation_gradient_rows(Matrix<const T> grad, Matrix<const T> h, Activation activation,
                              Matrix<T> du, Rows rows);

// out = values * noise, Dropout there and back; values and out may be one matrix.
template <Isa isa, class T>
void drop_rows(Matrix<const T> values, Matrix<const T> noise, Matrix<T> out, Rows rows);

// Of one block of rows: the mean of each column of z + b (z gets b added), and the sum of squared
// differences from that mean.
template <Isa isa, class T>
void column_moments(Matrix<T> z, const T* bias, Rows rows, T* mean, T* squares);

template <class T>
struct BatchNorm {
  const T* mean;     // (columns,) of the batch
  const T* inverse;  // (columns,) 1 / sqrt(variance + eps)
  const T* weight;   // (columns,) or null
  const T* bias;     // (columns,) or null
};

// z = (z - mean) * inverse, in place;  h = phi(z * weight + bias).
template <Isa isa, class T>
void normalize_rows(Matrix<T> z, const BatchNorm<T>& norm, Activation activation, Matrix<T> h,
                    Rows rows);

// Of one block of rows: the columns' sums of du and of du * z, z being the normalised.
template <Isa isa, class T>
void column_dots(Matrix<const T> du, Matrix<const T> z, Rows rows, T* sums, T* dots);

// du = weight * inverse * (du - sums / batch - z * dots / batch), in place.
template <Isa isa, class T>
void normalize_gradient_rows(Matrix<T> du, Matrix<const T> z, const BatchNorm<T>& norm,
                             const T* sums, const T* dots, T batch, Rows rows);

// error = scale * (prediction - target), `scale` being that of the loss's gradient; returns the sum
// of the unscaled squares. target and error may be one matrix.
template <Isa isa, class T>
double error_rows(Matrix<const T> prediction, Matrix<const T> target, T scale, Matrix<T> error,
                  Rows rows);

// grad = (softmax(output) - onehot(target)) * scale; returns the sum of -log softmax at the
// targets. Rows whose target is kIgnoreIndex have neither.
template <Isa isa, class T>
double cross_entropy_rows(Matrix<const T> output, const int64_t* target, T scale, Matrix<T> grad,
                          Rows rows);

// sums[c] = sum over `batch` rows of the columns [first, last). More than kShortBatch rows are
// summed kSummedRows at a time, and these sums in double: more additions in a row would lose more
// than torch's own sums do. Up to kOverread bytes behind the last element are read.
constexpr int64_t kShortBatch = 64, kSummedRows = 16;
template <Isa isa, class T>
void sum_columns(Matrix<const T> matrix, int64_t batch, int64_t first, int64_t last, T* sums);

// Elements [0, count) of a parameter; of bfloat16 in float32, rounded once.
template <Isa isa, class T>
void update(const Update<accumulate_t<T>>& rule, const T* grad, T* parameter, T* first, T* second,
            int64_t count);

}  // namespace fastdni::cpu
