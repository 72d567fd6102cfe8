#include "cpu/kernels/recurrence.h"

#include <type_traits>

#include "cpu/kernels/multiply.h"

namespace fastdni::cpu {
namespace {

constexpr Isa kIsa = Isa::FASTDNI_ISA;

template <class T>
inline T sigmoid(T x) {
  return activate<Activation::sigmoid>(x);
}

// Without biases zeros stand for them: the caller's.
template <class T>
void lstm_forward(const CellStep<T>& s, int64_t hidden, Rows rows) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    T* __restrict__ i = s.gates.row(r);
    T* __restrict__ f = i + hidden;
    T* __restrict__ g = f + hidden;
    T* __restrict__ o = g + hidden;
    const T* __restrict__ before = s.before.row(r);
    const T* __restrict__ bias = s.bias;
    T* __restrict__ c = s.c.row(r);
    T* __restrict__ tanh_c = s.tanh_c.row(r);
    T* __restrict__ h = s.h.row(r);
#pragma omp simd
    for (int64_t k = 0; k < hidden; ++k) i[k] = sigmoid(i[k] + bias[k]);
#pragma omp simd
    for (int64_t k = 0; k < hidden; ++k) f[k] = sigmoid(f[k] + bias[hidden + k]);
#pragma omp simd
    for (int64_t k = 0; k < hidden; ++k) g[k] = hyperbolic_tangent(g[k] + bias[2 * hidden + k]);
#pragma omp simd
    for (int64_t k = 0; k < hidden; ++k) o[k] = sigmoid(o[k] + bias[3 * hidden + k]);
#pragma omp simd
    for (int64_t k = 0; k < hidden; ++k) {
      c[k] = f[k] * before[k] + i[k] * g[k];
      tanh_c[k] = hyperbolic_tangent(c[k]);
      h[k] = o[k] * tanh_c[k];
    }
  }
}

template <class T>
void gru_forward(const CellStep<T>& s, int64_t hidden, Rows rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    T* __restrict__ r = s.gates.row(row);
    T* __restrict__ z = r + hidden;
    T* __restrict__ n = z + hidden;
    T* __restrict__ recurrent = s.recurrent.row(row);
    T* __restrict__ of_n = recurrent + 2 * hidden;
    const T* __restrict__ before = s.before.row(row);
    const T* __restrict__ bias = s.bias;
    const T* __restrict__ bias_n = s.bias_n;
    T* __restrict__ h = s.h.row(row);
#pragma omp simd
    for (int64_t k = 0; k < 2 * hidden; ++k) r[k] = sigmoid(r[k] + recurrent[k] + bias[k]);
#pragma omp simd
    for (int64_t k = 0; k < hidden; ++k) {
      of_n[k] += bias_n[k];
      n[k] = hyperbolic_tangent(n[k] + bias[2 * hidden + k] + r[k] * of_n[k]);
      h[k] = n[k] + z[k] * (before[k] - n[k]);
    }
  }
}

template <Activation phi, class T>
void plain_forward(const CellStep<T>& s, int64_t hidden, Rows rows) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* __restrict__ u = s.gates.row(r);
    const T* __restrict__ bias = s.bias;
    T* __restrict__ h = s.h.row(r);
#pragma omp simd
    for (int64_t k = 0; k < hidden; ++k) h[k] = activate<phi>(u[k] + bias[k]);
  }
}

// grad_h += grad_above
template <class T>
inline void add_above(const CellGradient<T>& s, int64_t row, int64_t hidden) {
  if (s.grad_above.data == nullptr) return;
  T* __restrict__ dh = s.grad_h.row(row);
  const T* __restrict__ from = s.grad_above.row(row);
#pragma omp simd
  for (int64_t k = 0; k < hidden; ++k) dh[k] += from[k];
}

template <class T>
void lstm_backward(const CellGradient<T>& s, int64_t hidden, Rows rows) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    add_above(s, r, hidden);
    const T* __restrict__ i = s.gates.row(r);
    const T* __restrict__ f = i + hidden;
    const T* __restrict__ g = f + hidden;
    const T* __restrict__ o = g + hidden;
    const T* __restrict__ before = s.before.row(r);
    const T* __restrict__ tanh_c = s.tanh_c.row(r);
    T* __restrict__ dh = s.grad_h.row(r);
    T* __restrict__ dc = s.grad_c.row(r);
    T* __restrict__ di = s.grad_gates.row(r);
    T* __restrict__ df = di + hidden;
    T* __restrict__ dg = df + hidden;
    T* __restrict__ d_o = dg + hidden;
#pragma omp simd
    for (int64_t k = 0; k < hidden; ++k) {
      const T of_c = dc[k] + activation_gradient<Activation::tanh>(dh[k] * o[k], tanh_c[k]);
      di[k] = activation_gradient<Activation::sigmoid>(of_c * g[k], i[k]);
      df[k] = activation_gradient<Activation::sigmoid>(of_c * before[k], f[k]);
      dg[k] = activation_gradient<Activation::tanh>(of_c * i[k], g[k]);
      d_o[k] = activation_gradient<Activation::sigmoid>(dh[k] * tanh_c[k], o[k]);
      dc[k] = of_c * f[k];
    }
  }
}

template <class T>
void gru_backward(const CellGradient<T>& s, int64_t hidden, Rows rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    add_above(s, row, hidden);
    const T* __restrict__ r = s.gates.row(row);
    const T* __restrict__ z = r + hidden;
    const T* __restrict__ n = z + hidden;
    const T* __restrict__ of_n = s.recurrent.row(row) + 2 * hidden;
    const T* __restrict__ before = s.before.row(row);
    T* __restrict__ dh = s.grad_h.row(row);
    T* __restrict__ dr = s.grad_gates.row(row);
    T* __restrict__ dz = dr + hidden;
    T* __restrict__ dn = dz + hidden;
    T* __restrict__ recurrent = s.grad_recurrent.row(row);
#pragma omp simd
    for (int64_t k = 0; k < hidden; ++k) {
      const T of_new = activation_gradient<Activation::tanh>(dh[k] * (1 - z[k]), n[k]);
      dr[k] = activation_gradient<Activation::sigmoid>(of_new * of_n[k], r[k]);
      dz[k] = activation_gradient<Activation::sigmoid>(dh[k] * (before[k] - n[k]), z[k]);
      dn[k] = of_new;
      dh[k] *= z[k];
      recurrent[k] = dr[k];
      recurrent[hidden + k] = dz[k];
      recurrent[2 * hidden + k] = of_new * r[k];
    }
  }
}

template <Activation phi, class T>
void plain_backward(const CellGradient<T>& s, int64_t hidden, Rows rows) {
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    add_above(s, r, hidden);
    const T* __restrict__ h = s.gates.row(r);
    T* __restrict__ dh = s.grad_h.row(r);
    T* __restrict__ du = s.grad_gates.row(r);
#pragma omp simd
    for (int64_t k = 0; k < hidden; ++k) du[k] = activation_gradient<phi>(dh[k], h[k]);
  }
}

}  // namespace

template <Isa isa, class T>
void cell_forward(Cell cell, const CellStep<T>& step, int64_t hidden, Rows rows) {
  switch (cell) {
    case Cell::lstm:
      return lstm_forward(step, hidden, rows);
    case Cell::gru:
      return gru_forward(step, hidden, rows);
    case Cell::tanh:
      return plain_forward<Activation::tanh>(step, hidden, rows);
    case Cell::relu:
      return plain_forward<Activation::relu>(step, hidden, rows);
  }
}

template <Isa isa, class T>
void cell_backward(Cell cell, const CellGradient<T>& step, int64_t hidden, Rows rows) {
  switch (cell) {
    case Cell::lstm:
      return lstm_backward(step, hidden, rows);
    case Cell::gru:
      return gru_backward(step, hidden, rows);
    case Cell::tanh:
      return plain_backward<Activation::tanh>(step, hidden, rows);
    case Cell::relu:
      return plain_backward<Activation::relu>(step, hidden, rows);
  }
}

namespace {

// Outputs of kVectors vectors and `columns` inputs, whose sums stay in registers.
constexpr int kVectors = 4, kColumns = kIsa == Isa::avx512 ? 4 : 2;
template <int columns, class T>
inline void weighted_sum(const Matrix<const T>& grad, int64_t first, const T* x, int64_t inputs,
                         int64_t count, T (*sums)[kVectors * vector_bytes(kIsa) / sizeof(T)]) {
  constexpr int kLanes = vector_bytes(kIsa) / sizeof(T);
  typedef T Vector __attribute__((vector_size(vector_bytes(kIsa))));
  constexpr int64_t kShort = 64;  // rows that are summed before they are added up
  Vector total[columns][kVectors] = {};
  for (int64_t begin = 0; begin < count; begin += kShort) {
    const int64_t end = count - begin < kShort ? count : begin + kShort;
    Vector part[columns][kVectors] = {};
    for (int64_t b = begin; b < end; ++b) {
      const T* from = grad.row(b) + first;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Vector values;
        __builtin_memcpy(&values, from + v * kLanes, sizeof values);
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) part[c][v] += x[b * inputs + c] * values;
      }
    }
    for (int c = 0; c < columns; ++c) {
      for (int v = 0; v < kVectors; ++v) total[c][v] += part[c][v];
    }
  }
  __builtin_memcpy(sums, total, sizeof total);
}

}  // namespace

template <Isa isa, class T>
void weighted_sums(Matrix<const T> grad, const T* x, int64_t inputs, int64_t count, Rows outputs,
                   T* weight) {
  constexpr int64_t kOutputs = kVectors * vector_bytes(isa) / sizeof(T);
  for (int64_t first = outputs.begin; first < outputs.end; first += kOutputs) {
    const int64_t left = outputs.end - first, width = left < kOutputs ? left : kOutputs;
    for (int64_t column = 0; column < inputs;) {
      const int64_t columns = inputs - column < kColumns ? inputs - column : kColumns;
      T sums[kColumns][kOutputs];
      const auto sum = [&](auto some) {
        weighted_sum<some.value>(grad, first, x + column, inputs, count, sums);
      };
      switch (columns) {
        case 1:
          sum(std::integral_constant<int, 1>{});
          break;
        case 2:
          sum(std::integral_constant<int, 2>{});
          break;
        case 3:  // it must compile where there are never so many
          sum(std::integral_constant<int, kColumns == 2 ? 2 : 3>{});
          break;
        default:
          sum(std::integral_constant<int, kColumns>{});
      }
      for (int64_t r = 0; r < width; ++r) {
        for (int64_t c = 0; c < columns; ++c)
          weight[(first + r) * inputs + column + c] = sums[c][r];
      }
      column += columns;
    }
  }
}

#define INSTANTIATE(T)                                                               \
  template void cell_forward<kIsa, T>(Cell, const CellStep<T>&, int64_t, Rows);      \
  template void cell_backward<kIsa, T>(Cell, const CellGradient<T>&, int64_t, Rows); \
  template void weighted_sums<kIsa, T>(Matrix<const T>, const T*, int64_t, int64_t, Rows, T*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace fastdni::cpu
