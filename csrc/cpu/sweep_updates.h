// U: every weight gradient of a step, each with its optimizer, as a list of tasks that are
// independent of one another.
#pragma once
#include <cmath>
#include <vector>

#include "cpu/sweep_memory.h"
#include "ops/sweep_plan.h"

namespace fastdni::cpu {

// Columns of a weight gradient that are worked out before its optimizer takes them.
constexpr int64_t kUpdateColumns = 512;

template <Isa isa, class T>
class Updates {
 public:
  Updates(int64_t batch, bool bfloat16) : batch_(batch), bfloat16_(bfloat16) {}

  // grad^T input -> the weight's gradient, the columns' sums of grad -> those of the biases.
  // Without an input grad is a vector, and the gradient itself. A masked stage's are left out.
  void add(const Matrix<T>& grad, const Activations<T>* input, int32_t weight, int32_t bias,
           int32_t second_bias, size_t stage) {
    const int64_t outputs = grad.columns;
    const int64_t read = input == nullptr ? 1 : batch_ * input->rows.columns;
    const int64_t count = pieces<T>(outputs, read);
    for (int64_t i = 0; i < count; ++i) {
      tasks_.push_back({jobs_.size(), outputs * i / count, outputs * (i + 1) / count});
    }
    work_ += outputs * read;
    jobs_.push_back({grad, input, weight, bias, second_bias, stage});
  }

  void run(const StepMemory& memory) {
    memory_ = &memory;
    rules_.resize(memory.parameters.size());
    const auto power = [this](double beta, double step) { return this->power(beta, step); };
    for (size_t i = 0; i < rules_.size(); ++i) {
      const ParameterMemory& parameter = memory.parameters[i];
      rules_[i] = prepared<T>(parameter.settings, parameter.step, power);
    }
    in_parallel(tasks_.size(), work_, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) run(tasks_[i]);
    });
  }

 private:
  struct Job {
    Matrix<T> grad;
    const Activations<T>* input;
    int32_t weight, bias, second_bias;
    size_t stage;
  };
  struct Task {
    size_t job;
    int64_t first, last;  // outputs
  };

  // beta^step: most parameters share both.
  double power(double beta, double step) {
    for (const auto& known : powers_) {
      if (known.beta == beta && known.step == step) return known.value;
    }
    std::swap(powers_[0], powers_[1]);
    powers_[0] = {beta, step, std::pow(beta, step)};
    return powers_[0].value;
  }

  void apply(int32_t parameter, const T* grad, int64_t at, int64_t count) {
    const ParameterMemory& memory = memory_->parameters[parameter];
    T* target = static_cast<T*>(memory.value) + at;
    const auto beside = [&](void* kept) {
      return kept == nullptr ? target : static_cast<T*>(kept) + at;
    };
    cpu::update<isa, T>(rules_[parameter], grad, target, beside(memory.first),
                        beside(memory.second), count);
  }

  bool updated(int32_t parameter) const {
    return parameter != kNone && rules_[parameter].rule != Rule::none;
  }

  void run(const Task& task) {
    const Job& job = jobs_[task.job];
    if (!memory_->active[job.stage]) return;
    const int64_t outputs = task.last - task.first;
    if (job.input == nullptr) {
      if (updated(job.weight)) apply(job.weight, job.grad.data + task.first, task.first, outputs);
      return;
    }
    if (updated(job.weight)) update_weight(job, task.first, outputs);
    if (updated(job.bias) || updated(job.second_bias)) {
      T sums[kLargeBlockRows];
      cpu::sum_columns<isa, T>(job.grad, batch_, task.first, task.last, sums);
      for (int32_t bias : {job.bias, job.second_bias}) {
        if (updated(bias)) apply(bias, sums, task.first, outputs);
      }
    }
  }

  void update_weight(const Job& job, int64_t first, int64_t outputs) {
    constexpr int64_t kWidth = cpu::kPanelWidth<isa, T>;
    constexpr int64_t kUpdatePanels = kUpdateColumns / kWidth;
    alignas(64) T grad[kLargeBlockRows * kUpdateColumns];
    const int64_t inputs = job.input->rows.columns, panels = cpu::panels<isa, T>(inputs);
    const cpu::Strided<T> left{job.grad.data + first, 1, job.grad.stride};
    for (int64_t p = 0; p < panels; p += kUpdatePanels) {
      const int64_t end = std::min(p + kUpdatePanels, panels), stride = (end - p) * kWidth;
      cpu::multiply<isa, T>(left, job.input->panels, outputs, batch_, p, end, bfloat16_, false,
                            grad, stride);
      if (stride == inputs) {
        apply(job.weight, grad, first * inputs, outputs * inputs);
        continue;
      }
      const int64_t columns = std::min(end * kWidth, inputs) - p * kWidth;
      for (int64_t r = 0; r < outputs; ++r) {
        apply(job.weight, grad + r * stride, (first + r) * inputs + p * kWidth, columns);
      }
    }
  }

  int64_t batch_;
  bool bfloat16_;
  int64_t work_ = 0;
  std::vector<Job> jobs_;
  std::vector<Task> tasks_;
  // Of the step at work.
  const StepMemory* memory_ = nullptr;
  std::vector<Update<T>> rules_;
  struct Power {
    double beta = 0, step = 0, value = 0;
  };
  Power powers_[2];
};

}  // namespace fastdni::cpu
