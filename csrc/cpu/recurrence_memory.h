// What a window of the recurrence op works on, and the products over its rows.
#pragma once
#include <cstring>
#include <vector>

#include "cpu/kernels/recurrence.h"
#include "cpu/sweep_memory.h"

namespace fastdni::cpu {

// Matrices of T B rows, laid one after the other into one tensor.
template <class T>
class Store {
 public:
  explicit Store(T* begin) : next_(begin) {}

  Matrix<T> matrix(int64_t rows, int64_t columns, int64_t stride) {
    T* begin = take(rows * stride);
    return {begin, columns, stride};
  }
  T* take(int64_t count) {
    constexpr int64_t kLine = 64 / sizeof(T);
    T* begin = next_ + used_;
    used_ += (count + kLine - 1) / kLine * kLine;
    return begin;
  }
  // With what kernels may read behind the last element.
  int64_t count() const { return used_ + kWeightedOverread / static_cast<int64_t>(sizeof(T)); }

 private:
  T* next_;
  int64_t used_ = 0;
};

// What the forward pass leaves of a layer for the backward pass.
template <class T>
struct LayerMemory {
  Matrix<T> gates, recurrent, c, tanh_c, h;
};

// One weight of a layer with its biases: grad^T [x | 1].
template <class T>
struct WeightJob {
  Matrix<T> grad;   // (T B, outputs)
  const T* panels;  // of x; null: it has few columns, and lies in `rows`
  const T* rows;
  int64_t columns;
  T *weight, *bias, *second_bias;  // null where there is none
};

// Rows [begin, end) of grad^T x.
template <Isa isa, class T>
void multiply_rows(const WeightJob<T>& job, int64_t batch, int64_t begin, int64_t end) {
  constexpr int64_t kWidth = kPanelWidth<isa, T>, kPanels = 512 / kWidth;
  alignas(64) T part[kLargeBlockRows * kPanels * kWidth];
  const Strided<T> left{job.grad.data + begin, 1, job.grad.stride};
  const int64_t count = panels<isa, T>(job.columns);
  for (int64_t p = 0; p < count; p += kPanels) {
    const int64_t until = std::min(p + kPanels, count), stride = (until - p) * kWidth;
    multiply<isa, T>(left, job.panels, end - begin, batch, p, until, false, false, part, stride);
    const int64_t some = std::min(until * kWidth, job.columns) - p * kWidth;
    for (int64_t r = begin; r < end; ++r) {
      std::memcpy(job.weight + r * job.columns + p * kWidth, part + (r - begin) * stride,
                  some * sizeof(T));
    }
  }
}

// All of them, each cut into `cut` pieces.
template <Isa isa, class T>
void run_jobs(const std::vector<WeightJob<T>>& jobs, int64_t batch, int64_t outputs, int64_t cut,
              int64_t work) {
  in_parallel(static_cast<int64_t>(jobs.size()) * cut, work, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      const WeightJob<T>& job = jobs[i / cut];
      const int64_t begin = outputs * (i % cut) / cut, until = outputs * (i % cut + 1) / cut;
      if (job.panels == nullptr) {
        weighted_sums<isa, T>(job.grad, job.rows, job.columns, batch, {begin, until}, job.weight);
      } else {
        multiply_rows<isa, T>(job, batch, begin, until);
      }
      if (job.bias == nullptr) continue;
      sum_columns<isa, T>(job.grad, batch, begin, until, job.bias + begin);
      if (job.second_bias == nullptr) continue;
      std::memcpy(job.second_bias + begin, job.bias + begin, (until - begin) * sizeof(T));
    }
  });
}

}  // namespace fastdni::cpu
