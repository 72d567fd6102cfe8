// What the parts of a CPU sweep share: how rows are cut into pieces and spread over threads, and
// the memory that a plan owns.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <deque>
#include <limits>
#include <memory>

#include "cpu/kernels/multiply.h"
#include "cpu/kernels/sweep.h"
#include "ops/tensor.h"

namespace fastdni::cpu {

// Rows of a block. Few, so that there is something for every thread and a block's activations stay
// near; but every block reads all weights, so more where these are too large for a core's own
// cache.
constexpr int64_t kBlockRows = 24, kLargeBlockRows = 64;
constexpr int64_t kLargeBytes = 512 << 10;
// Rows of the blocks that go through a pass together: a pass's weights are then read once for all
// of them, and what one pass leaves is still near for the next.
constexpr int64_t kGroupRows = 256;
static_assert(kLargeBlockRows <= cpu::kMultiplyRows);
// Multiply-adds worth waking a thread for: about 20 us.
constexpr int64_t kWorkPerThread = int64_t{1} << 20;

// How many pieces `rows` rows are cut into that each read `elements` elements.
template <class T>
int64_t pieces(int64_t rows, int64_t elements) {
  const bool large = elements * static_cast<int64_t>(sizeof(T)) >= kLargeBytes;
  const int64_t most = large ? kLargeBlockRows : kBlockRows;
  return (rows + most - 1) / most;
}

// `work`: multiply-adds of all `count` pieces together.
template <class Body>
void in_parallel(int64_t count, int64_t work, const Body& body) {
  if (count == 0) return;
  const int64_t threads = std::max(work / kWorkPerThread, int64_t{1});
  if (threads == 1 || count == 1) {
    body(0, count);
  } else {
    torch::stable::parallel_for(0, count, (count + threads - 1) / threads, body);
  }
}

// The rows of some activations and, for products over the batch, their panels.
template <class T>
struct Activations {
  Matrix<T> rows;
  T* panels = nullptr;
};

// Memory for matrices of `batch` rows, in rows of whole panels, and for anything else.
template <Isa isa, class T>
class Arena {
 public:
  explicit Arena(int64_t batch) : batch_(batch) {}

  int64_t bytes() const { return bytes_; }

  T* allocate(int64_t count) {
    constexpr size_t kLine = 64;
    const size_t bytes = (count * sizeof(T) + kLine - 1) / kLine * kLine + cpu::kOverread;
    bytes_ += bytes;
    blocks_.emplace_back(static_cast<T*>(std::aligned_alloc(kLine, bytes)));
    FASTDNI_CHECK(blocks_.back() != nullptr, "sweep: out of memory for ", bytes, " bytes");
    return blocks_.back().get();
  }

  Matrix<T> matrix(int64_t columns) {
    const int64_t stride = cpu::padded<isa, T>(columns);
    return {allocate(batch_ * stride), columns, stride};
  }

  // Activations with memory of their own, or with that of somebody else, to be set at each step.
  Activations<T>* activations(int64_t columns, bool own, bool panels) {
    activations_.push_back({own ? matrix(columns) : Matrix<T>{nullptr, columns, columns}, nullptr});
    if (panels) {
      activations_.back().panels = allocate(batch_ * cpu::padded<isa, T>(columns));
    }
    return &activations_.back();
  }

 private:
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };

  int64_t batch_, bytes_ = 0;
  std::vector<std::unique_ptr<T, Free>> blocks_;
  std::deque<Activations<T>> activations_;  // a deque: what points into it stays valid
};

}  // namespace fastdni::cpu
