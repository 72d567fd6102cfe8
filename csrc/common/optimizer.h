// One element of an optimizer's update, the same on the CPU and in CUDA, for kernels that have a
// gradient at hand and write the parameter at once.
//
// The formulas and the order of their operations are those of torch.optim: an update from a common
// state agrees to rounding.
#pragma once
#include <cmath>

#include "common/scalar.h"

namespace fastdni {

enum class Rule {
  none,      // nobody updates the parameter
  gradient,  // the gradient is added to (or becomes) p.grad
  sgd,
  sgd_momentum,
  adam,
  adamw,
};

// One parameter's optimizer, before the step count is known. `a`, `b`: momentum, dampening; or
// beta1, beta2; or, of Rule::gradient, whether to add (1) or to write (0).
struct OptimizerSettings {
  Rule rule = Rule::none;
  double lr = 0, weight_decay = 0, a = 0, b = 0, eps = 0;
  bool nesterov = false;

  bool operator==(const OptimizerSettings&) const = default;
};

// Its members, in their order, where they come as a row of numbers.
constexpr int kOptimizerNumbers = 7;

// A number that lives in a GPU's memory, as float32 or as float64; null where it does not.
struct DeviceNumber {
  void* at = nullptr;
  bool wide = false;

  bool operator==(const DeviceNumber&) const = default;
};

// One parameter's update, with what does not depend on the element worked out.
template <class T>
struct Update {
  Rule rule;
  T lr;            // adam: lr / (1 - beta1^step)
  T weight_decay;  // adamw: 1 - lr * weight_decay, the factor on the parameter
  // sgd_momentum: momentum, 1 - dampening;  adam: 1 - beta1, beta2;  gradient: 1 to add, 0 to write
  T a, b;
  T one_minus_b;      // adam: 1 - beta2
  T root_correction;  // adam: 1 / sqrt(1 - beta2^step)
  T eps;
  bool nesterov;

  bool operator==(const Update&) const = default;
};

// The numbers of a step; `power(beta, step)` is beta^step.
template <class T, class Power>
FASTDNI_HOST_DEVICE Update<T> prepared(const OptimizerSettings& s, double step,
                                       const Power& power) {
  Update<T> u{};
  u.rule = s.rule;
  u.lr = static_cast<T>(s.lr);
  u.weight_decay = static_cast<T>(s.weight_decay);
  u.a = static_cast<T>(s.a);
  u.b = static_cast<T>(s.b);
  u.eps = static_cast<T>(s.eps);
  u.nesterov = s.nesterov;
  if (s.rule == Rule::sgd_momentum) {
    u.b = static_cast<T>(1 - s.b);
  } else if (s.rule == Rule::adam || s.rule == Rule::adamw) {
    u.lr = static_cast<T>(s.lr / (1 - power(s.a, step)));
    u.root_correction = static_cast<T>(1 / square_root(1 - power(s.b, step)));
    u.a = static_cast<T>(1 - s.a);
    u.one_minus_b = static_cast<T>(1 - s.b);
    if (s.rule == Rule::adamw) u.weight_decay = static_cast<T>(1 - s.lr * s.weight_decay);
  }
  return u;
}

// Without decay an infinite parameter must not make the gradient NaN.
template <class T>
FASTDNI_HOST_DEVICE T decayed(T grad, T weight_decay, T parameter) {
  return weight_decay == 0 ? grad : grad + weight_decay * parameter;
}

// Memory of one element: the parameter, and what the rule keeps beside it (null where it does not):
// p.grad, momentum_buffer or exp_avg in `first`, exp_avg_sq in `second`. T is what lies in memory,
// A what is computed in: each value is rounded once, when it is stored.
template <Rule rule, class A, class T>
FASTDNI_HOST_DEVICE void update_element(const Update<A>& u, A grad, T* parameter, T* first,
                                        T* second) {
  if constexpr (rule == Rule::gradient) {
    // What is written first may be uninitialised.
    *first = static_cast<T>(u.a == 0 ? grad : static_cast<A>(*first) + grad);
  } else if constexpr (rule == Rule::sgd || rule == Rule::sgd_momentum) {
    const A p = static_cast<A>(*parameter);
    A d = decayed(grad, u.weight_decay, p);
    if constexpr (rule == Rule::sgd_momentum) {
      const A buffer = static_cast<A>(*first) * u.a + d * u.b;
      *first = static_cast<T>(buffer);
      d = u.nesterov ? d + u.a * buffer : buffer;
    }
    *parameter = static_cast<T>(p - u.lr * d);
  } else if constexpr (rule == Rule::adam || rule == Rule::adamw) {
    A p = static_cast<A>(*parameter);
    if constexpr (rule == Rule::adamw) {
      p *= u.weight_decay;
    } else {
      grad = decayed(grad, u.weight_decay, p);
    }
    const A before = static_cast<A>(*first);
    const A average = before + u.a * (grad - before);
    const A square = static_cast<A>(*second) * u.b + u.one_minus_b * (grad * grad);
    *first = static_cast<T>(average);
    *second = static_cast<T>(square);
    const A denominator = square_root(square) * u.root_correction + u.eps;
    *parameter = static_cast<T>(p - u.lr * (average / denominator));
  }
}

}  // namespace fastdni
