// Memory for the length of a call, kept by the thread for its next one: at small sizes to get it
// anew each time, from an allocator that has to look for it, is a sixth of a call.
#pragma once
#include <cstdlib>
#include <memory>
#include <vector>

#include "ops/tensor.h"

namespace fastdni::cpu {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : block_(take(count * static_cast<int64_t>(sizeof(T)))) {}
  Scratch(Scratch&& other) noexcept : block_(std::move(other.block_)) {}
  ~Scratch() {
    if (block_.memory != nullptr && block_.bytes <= kMostKept) kept().push_back(std::move(block_));
  }

  // Uninitialised, at a line's begin.
  T* data() const { return static_cast<T*>(block_.memory.get()); }

 private:
  static constexpr int64_t kLine = 64, kMostKept = 4 << 20, kBlocks = 8;

  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };
  struct Block {
    std::unique_ptr<void, Free> memory;
    int64_t bytes = 0;
  };

  static std::vector<Block>& kept() {
    static thread_local std::vector<Block> blocks;
    return blocks;
  }

  // The smallest that is kept and large enough, or a new one.
  static Block take(int64_t bytes) {
    std::vector<Block>& blocks = kept();
    auto best = blocks.end();
    for (auto each = blocks.begin(); each != blocks.end(); ++each) {
      if (each->bytes >= bytes && (best == blocks.end() || each->bytes < best->bytes)) best = each;
    }
    if (best != blocks.end()) {
      Block found = std::move(*best);
      blocks.erase(best);
      return found;
    }
    if (static_cast<int64_t>(blocks.size()) >= kBlocks) blocks.erase(blocks.begin());
    const int64_t rounded = (bytes + kLine - 1) / kLine * kLine + kLine;
    Block block{std::unique_ptr<void, Free>(std::aligned_alloc(kLine, rounded)), rounded};
    FASTDNI_CHECK(block.memory != nullptr, "fastdni: out of memory for ", rounded, " bytes");
    return block;
  }

  Block block_;
};

}  // namespace fastdni::cpu
