#include "cpu/kernels/sweep.h"

#include <cmath>

#include "cpu/kernels/multiply.h"

namespace fastdni::cpu {
namespace {

// Calls body(constant) with the activation as a compile-time constant.
template <Activation activation>
struct ActivationTag {
  static constexpr Activation value = activation;
};

template <class Body>
void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::identity:
      return body(ActivationTag<Activation::identity>{});
    case Activation::relu:
      return body(ActivationTag<Activation::relu>{});
    case Activation::tanh:
      return body(ActivationTag<Activation::tanh>{});
    case Activation::sigmoid:
      return body(ActivationTag<Activation::sigmoid>{});
  }
}

}  // namespace

template <Isa isa, class T>
void finish_rows(Matrix<T> z, const T* bias, const T* second_bias, Activation activation,
                 Rows rows) {
  const int64_t columns = z.columns;
  with_activation(activation, [&](auto phi) {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      T* __restrict__ h = z.row(r);
      if (second_bias != nullptr) {
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) {
          h[c] = activate<phi.value>(h[c] + bias[c] + second_bias[c]);
        }
      } else if (bias != nullptr) {
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) h[c] = activate<phi.value>(h[c] + bias[c]);
      } else if (phi.value != Activation::identity) {
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) h[c] = activate<phi.value>(h[c]);
      }
    }
  });
}

template <Isa isa, class T>
void activation_gradient_rows(Matrix<const T> grad, Matrix<const T> h, Activation activation,
                              Matrix<T> du, Rows rows) {
  const int64_t columns = du.columns;
  with_activation(activation, [&](auto phi) {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const T* g = grad.row(r);
      const T* value = h.row(r);
      T* out = du.row(r);
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) out[c] = activation_gradient<phi.value>(g[c], value[c]);
    }
  });
}

template <Isa isa, class T>
void drop_rows(Matrix<const T> values, Matrix<const T> noise, Matrix<T> out, Rows rows) {
  const int64_t columns = out.columns;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* value = values.row(r);
    const T* factor = noise.row(r);
    T* dropped = out.row(r);
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) dropped[c] = value[c] * factor[c];
  }
}

template <Isa isa, class T>
void column_moments(Matrix<T> z, const T* bias, Rows rows, T* __restrict__ mean,
                    T* __restrict__ squares) {
  const int64_t columns = z.columns;
  for (int64_t c = 0; c < columns; ++c) mean[c] = squares[c] = 0;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    T* __restrict__ values = z.row(r);
    if (bias != nullptr) {
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) values[c] += bias[c];
    }
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) mean[c] += values[c];
  }
  const T count = static_cast<T>(rows.end - rows.begin);
#pragma omp simd
  for (int64_t c = 0; c < columns; ++c) mean[c] /= count;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* __restrict__ values = z.row(r);
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      squares[c] += (values[c] - mean[c]) * (values[c] - mean[c]);
    }
  }
}

template <Isa isa, class T>
void normalize_rows(Matrix<T> z, const BatchNorm<T>& norm, Activation activation, Matrix<T> h,
                    Rows rows) {
  const int64_t columns = z.columns;
  const T* __restrict__ mean = norm.mean, * __restrict__ inverse = norm.inverse;
  const T* __restrict__ weight = norm.weight, * __restrict__ bias = norm.bias;
  with_activation(activation, [&](auto phi) {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      T* __restrict__ values = z.row(r);
      T* __restrict__ out = h.row(r);
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) values[c] = (values[c] - mean[c]) * inverse[c];
      if (weight != nullptr) {
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) {
          out[c] = activate<phi.value>(values[c] * weight[c] + bias[c]);
        }
      } else {
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) out[c] = activate<phi.value>(values[c]);
      }
    }
  });
}

template <Isa isa, class T>
void column_dots(Matrix<const T> du, Matrix<const T> z, Rows rows, T* __restrict__ sums,
                 T* __restrict__ dots) {
  const int64_t columns = du.columns;
  for (int64_t c = 0; c < columns; ++c) sums[c] = dots[c] = 0;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* __restrict__ g = du.row(r), * __restrict__ values = z.row(r);
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      sums[c] += g[c];
      dots[c] += g[c] * values[c];
    }
  }
}

template <Isa isa, class T>
void normalize_gradient_rows(Matrix<T> du, Matrix<const T> z, const BatchNorm<T>& norm,
                             const T* __restrict__ sums, const T* __restrict__ dots, T batch,
                             Rows rows) {
  const int64_t columns = du.columns;
  const T* __restrict__ inverse = norm.inverse, * __restrict__ weight = norm.weight;
  const T share = 1 / batch;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    T* __restrict__ g = du.row(r);
    const T* __restrict__ values = z.row(r);
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) {
      const T scale = weight != nullptr ? weight[c] * inverse[c] : inverse[c];
      g[c] = scale * (g[c] - sums[c] * share - values[c] * (dots[c] * share));
    }
  }
}

template <Isa isa, class T>
double error_rows(Matrix<const T> prediction, Matrix<const T> target, T scale, Matrix<T> error,
                  Rows rows) {
  double squares = 0;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* p = prediction.row(r);
    const T* t = target.row(r);
    T* e = error.row(r);
    T row = 0;
#pragma omp simd reduction(+ : row)
    for (int64_t c = 0; c < error.columns; ++c) {
      const T difference = p[c] - t[c];
      row += difference * difference;
      e[c] = scale * difference;
    }
    squares += row;
  }
  return squares;
}

template <Isa isa, class T>
double cross_entropy_rows(Matrix<const T> output, const int64_t* target, T scale, Matrix<T> grad,
                          Rows rows) {
  const int64_t columns = output.columns;
  double loss = 0;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* __restrict__ out = output.row(r);
    T* __restrict__ g = grad.row(r);
    if (target[r] == kIgnoreIndex) {
      for (int64_t c = 0; c < columns; ++c) g[c] = 0;
      continue;
    }
    T largest = out[0];
    for (int64_t c = 1; c < columns; ++c) largest = out[c] > largest ? out[c] : largest;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < columns; ++c) {
      g[c] = exponential(out[c] - largest);
      sum += g[c];
    }
    const T share = scale / sum;
#pragma omp simd
    for (int64_t c = 0; c < columns; ++c) g[c] *= share;
    g[target[r]] -= scale;
    loss += std::log(sum) + (largest - out[target[r]]);
  }
  return loss;
}

template <Isa isa, class T>
void sum_columns(Matrix<const T> matrix, int64_t batch, int64_t first, int64_t last,
                 T* __restrict__ sums) {
  constexpr int64_t kLanes = vector_bytes(isa) / sizeof(T);
  typedef T Vector __attribute__((vector_size(vector_bytes(isa))));
  typedef double Wide __attribute__((vector_size(kLanes * sizeof(double))));
  static_assert(sizeof(Vector) <= kOverread);
  const int64_t step = batch <= kShortBatch ? kShortBatch : kSummedRows;
  for (int64_t c = first; c < last; c += kLanes) {
    Vector part{};
    Wide total{};
    for (int64_t begin = 0; begin < batch; begin += step) {
      const int64_t end = batch - begin < step ? batch : begin + step;
      part = Vector{};
      for (int64_t r = begin; r < end; ++r) {
        Vector values;
        __builtin_memcpy(&values, matrix.row(r) + c, sizeof values);
        part += values;
      }
      if (batch > kShortBatch) total += __builtin_convertvector(part, Wide);
    }
    if (batch > kShortBatch) part = __builtin_convertvector(total, Vector);
    const int64_t columns = last - c < kLanes ? last - c : kLanes;
    __builtin_memcpy(sums + c - first, &part, columns * sizeof(T));
  }
}

namespace {

template <Rule rule, class T>
void update_by(const Update<accumulate_t<T>>& given, const T* __restrict__ grad,
               T* __restrict__ parameter, T* __restrict__ first, T* __restrict__ second,
               int64_t count) {
  using A = accumulate_t<T>;
  const Update<A> u = given;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    update_element<rule>(u, static_cast<A>(grad[i]), parameter + i, first + i, second + i);
  }
}

}  // namespace

template <Isa isa, class T>
void update(const Update<accumulate_t<T>>& rule, const T* grad, T* parameter, T* first, T* second,
            int64_t count) {
  switch (rule.rule) {
    case Rule::none:
      return;
    case Rule::gradient:
      return update_by<Rule::gradient>(rule, grad, parameter, first, second, count);
    case Rule::sgd:
      return update_by<Rule::sgd>(rule, grad, parameter, first, second, count);
    case Rule::sgd_momentum:
      return update_by<Rule::sgd_momentum>(rule, grad, parameter, first, second, count);
    case Rule::adam:
      return update_by<Rule::adam>(rule, grad, parameter, first, second, count);
    case Rule::adamw:
      return update_by<Rule::adamw>(rule, grad, parameter, first, second, count);
  }
}

#define INSTANTIATE(T)                                                                             \
  template void finish_rows<Isa::FASTDNI_ISA, T>(Matrix<T>, const T*, const T*, Activation, Rows); \
  template void activation_gradient_rows<Isa::FASTDNI_ISA, T>(Matrix<const T>, Matrix<const T>,    \
                                                              Activation, Matrix<T>, Rows);        \
  template void drop_rows<Isa::FASTDNI_ISA, T>(Matrix<const T>, Matrix<const T>, Matrix<T>, Rows); \
  template void column_moments<Isa::FASTDNI_ISA, T>(Matrix<T>, const T*, Rows, T*, T*);            \
  template void normalize_rows<Isa::FASTDNI_ISA, T>(Matrix<T>, const BatchNorm<T>&, Activation,    \
                                                    Matrix<T>, Rows);                              \
  template void column_dots<Isa::FASTDNI_ISA, T>(Matrix<const T>, Matrix<const T>, Rows, T*, T*);  \
  template void normalize_gradient_rows<Isa::FASTDNI_ISA, T>(                                      \
      Matrix<T>, Matrix<const T>, const BatchNorm<T>&, const T*, const T*, T, Rows);               \
  template double error_rows<Isa::FASTDNI_ISA, T>(Matrix<const T>, Matrix<const T>, T, Matrix<T>,  \
                                                  Rows);                                           \
  template double cross_entropy_rows<Isa::FASTDNI_ISA, T>(Matrix<const T>, const int64_t*, T,      \
                                                          Matrix<T>, Rows);                        \
  template void sum_columns<Isa::FASTDNI_ISA, T>(Matrix<const T>, int64_t, int64_t, int64_t, T*);
INSTANTIATE(float)
INSTANTIATE(double)

#define INSTANTIATE_UPDATE(T)                                                                     \
  template void update<Isa::FASTDNI_ISA, T>(const Update<accumulate_t<T>>&, const T*, T*, T*, T*, \
                                            int64_t);
INSTANTIATE_UPDATE(float)
INSTANTIATE_UPDATE(double)
INSTANTIATE_UPDATE(bfloat16)

}  // namespace fastdni::cpu
