// A stage's activation phi and its derivative, the same on the CPU and in CUDA.
#pragma once
#include "common/scalar.h"

namespace fastdni {

enum class Activation { identity, relu, tanh, sigmoid };

namespace detail {

// Taylor coefficients of e^r: at |r| <= ln(2) / 2 the first one left out is below half a unit.
template <class T>
struct Exponential;

template <>
struct Exponential<float> {
  using Bits = int32_t;
  static constexpr int kDegree = 7, kMantissa = 23, kBias = 127;
  // Adding it leaves the nearest integer in the lowest bits.
  static constexpr float kRound = 12582912.0f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kMin = -87.0f, kMax = 88.0f;
};

template <>
struct Exponential<double> {
  using Bits = int64_t;
  static constexpr int kDegree = 13, kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kMin = -708.0, kMax = 709.0;
};

// e^x = 2^n (1 + p), with p = e^r - 1 and |r| <= ln(2) / 2. Plain arithmetic, so that loops over it
// become vector code; |x| must be in range.
template <class T>
FASTDNI_HOST_DEVICE void split_exponential(T x, T* power, T* p) {
  using E = Exponential<T>;
  using Bits = typename E::Bits;
  const T shifted = x * T(1.44269504088896340736) + E::kRound;
  const T n = shifted - E::kRound;
  const T r = (x - n * E::kLn2High) - n * E::kLn2Low;
  T sum = 1;  // r + r^2/2! + ... = r (1 + r/2 (1 + r/3 (...)))
#pragma GCC unroll 16
  for (int i = E::kDegree; i > 1; --i) sum = T(1) + sum * r * (T(1) / T(i));
  *p = r * sum;
  const Bits exponent = __builtin_bit_cast(Bits, shifted) - __builtin_bit_cast(Bits, E::kRound);
  *power = __builtin_bit_cast(T, static_cast<Bits>((exponent + E::kBias) << E::kMantissa));
}

}  // namespace detail

// e^x; 0 below e^kMin and infinity above e^kMax, a little within the dtype's range. NaN stays NaN.
template <class T>
FASTDNI_HOST_DEVICE T exponential(T x) {
  using E = detail::Exponential<T>;
  const T low = x < E::kMin ? E::kMin : x;
  const T clamped = low > E::kMax ? E::kMax : low;
  T power, p;
  detail::split_exponential(clamped, &power, &p);
  const T value = power + power * p;
  return x < E::kMin ? T(0) : x > E::kMax ? T(__builtin_inf()) : value;
}

// From e^(2|x|) - 1, which keeps every digit near zero.
template <class T>
FASTDNI_HOST_DEVICE T hyperbolic_tangent(T x) {
  const T twice = 2 * (x < 0 ? -x : x);
  const T clamped = twice > T(40) ? T(40) : twice;  // 1 to the last bit from there on
  T power, p;
  detail::split_exponential(clamped, &power, &p);
  const T m = power * p + (power - 1);
  const T value = m / (m + 2);
  return x < 0 ? -value : value;
}

// h = phi(u)
template <Activation activation, class T>
FASTDNI_HOST_DEVICE T activate(T u) {
  switch (activation) {
    case Activation::relu:
      return u < 0 ? T(0) : u;  // NaN stays NaN, as in torch
    case Activation::tanh:
      return hyperbolic_tangent(u);
    case Activation::sigmoid:
      return T(1) / (T(1) + exponential(-u));
    default:
      return u;
  }
}

// grad_h * phi'(u), from h = phi(u)
template <Activation activation, class T>
FASTDNI_HOST_DEVICE T activation_gradient(T grad_h, T h) {
  switch (activation) {
    case Activation::relu:
      return h <= 0 ? T(0) : grad_h;  // a NaN in h lets the gradient through, as in torch
    case Activation::tanh:
      return grad_h * (T(1) - h * h);
    case Activation::sigmoid:
      return grad_h * (h * (T(1) - h));
    default:
      return grad_h;
  }
}

}  // namespace fastdni
