// Runs CUDA kernels on the host, compiled as plain C++, so that they can be proved without a GPU.
//
// Every CUDA thread is a fiber. The fibers of a block take turns on one OS thread and change at
// barriers and warp collectives only. What it models:
//   - __syncthreads, the warp collectives, the tensor cores' products and the barrier of a cluster,
//     with a diagnosis when threads disagree about them;
//   - any order of threads and blocks: with a seed, both are shuffled; the blocks of a cluster run
//     together;
//   - shared memory: each block gets fresh arrays filled with NaN, on the heap, so that the address
//     sanitizer sees accesses out of bounds;
//   - races: under the thread sanitizer nothing but a barrier or a collective orders the threads of
//     a block, and nothing but the end of a launch (or a cluster's barrier) orders its blocks.
// What it does not: cooperative launches; atomics and fences as order between blocks; copies and
// products that run beside the thread (wgmma, TMA, mbarrier); the limits of a device (registers,
// shared memory, occupancy); stack overflow, except under the address sanitizer; floating point
// contraction.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <source_location>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"
#include "fiber.h"

// Those of the CUDA thread that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace simt {

using Where = std::source_location;
constexpr unsigned kLanes = 32;

inline std::optional<unsigned> shuffle_seed;  // none: threads and blocks run in index order

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "simt: %s\n", message.c_str());
  std::_Exit(3);
}

inline std::string to_string(const Where& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

// A collective in progress: complete when everyone expected has come.
struct Meeting {
  Where where;
  unsigned mask;
  unsigned expected;
  unsigned arrived = 0, left = 0;
  std::array<uint64_t, kLanes> values{};  // by lane
  std::shared_ptr<void> shared{};         // or what all of them fill
  char order = 0;                         // its address is the object that is released and acquired

  bool complete() const { return arrived == expected; }
};

// A warp or a block: those who may meet. At most one meeting per mask is open.
struct Group {
  std::vector<Meeting*> open;

  Meeting* join(unsigned mask, unsigned expected, const Where& where) {
    auto found = std::find_if(open.begin(), open.end(), [&](auto* m) { return m->mask == mask; });
    if (found == open.end()) found = open.insert(open.end(), new Meeting{where, mask, expected});
    Meeting* meeting = *found;
    if (to_string(meeting->where) != to_string(where) ||
        meeting->where.column() != where.column()) {
      fail("threads meet at different places: " + to_string(meeting->where) + " and " +
           to_string(where));
    }
    if (++meeting->arrived == expected) open.erase(found);
    return meeting;
  }
};

struct Block;

struct Thread {
  Block* block;
  Group* warp;
  uint3 index;
  unsigned lane;
  Fiber fiber;
  Meeting* waiting = nullptr;
  bool exited = false;

  bool can_run() const { return !exited && (!waiting || waiting->complete()); }
};

struct FreeShared {
  void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  static constexpr std::align_val_t kAlignment{128};
};

struct Cluster {
  Group everyone;
  unsigned threads = 0;
};

struct Block {
  uint3 index;
  Cluster* cluster;
  Group everyone;
  std::vector<Group> warps;
  std::vector<std::unique_ptr<Thread>> threads;
  std::map<const void*, std::unique_ptr<void, FreeShared>> shared;  // by declaration
};

struct Launch {
  std::function<void()> kernel;
  std::mt19937 random;
  char started = 0, ended = 0;  // objects to release and acquire
};

inline Thread* current = nullptr;
inline Launch* launched = nullptr;

// The calling thread's part in a collective: hands something in and waits for the others, whose
// values can then be read.
class Collective {
 public:
  template <class HandIn>
  Collective(Group& group, unsigned mask, unsigned expected, const Where& where,
             const HandIn& hand_in)
      : self_(current), meeting_(group.join(mask, expected, where)) {
    hand_in(*meeting_);
    self_->waiting = meeting_;
    release(&meeting_->order);
    Fiber::suspend();
    acquire(&meeting_->order);
    self_->waiting = nullptr;
  }
  ~Collective() {
    if (++meeting_->left == meeting_->expected) delete meeting_;
  }
  Collective(const Collective&) = delete;

  uint64_t value(unsigned lane) const {
    if (!(meeting_->mask >> lane & 1)) fail("a lane outside the mask is read" + at());
    return meeting_->values[lane];
  }
  const void* shared() const { return meeting_->shared.get(); }

 private:
  std::string at() const { return ": " + to_string(meeting_->where); }

  Unwatched unwatched_;
  Thread* self_;
  Meeting* meeting_;
};

inline void block_barrier(const Where& where) {
  Block& block = *current->block;
  Collective(block.everyone, ~0u, block.threads.size(), where, [](Meeting&) {});
}

inline void cluster_barrier(const Where& where) {
  Cluster& cluster = *current->block->cluster;
  Collective(cluster.everyone, ~0u, cluster.threads, where, [](Meeting&) {});
}

inline void warp_barrier(unsigned mask, const Where& where) {
  Collective(*current->warp, mask, __builtin_popcount(mask), where, [](Meeting&) {});
}

// All lanes of a warp write to one Shared, and read it when all have.
template <class Shared, class Write, class Read>
void together(const Write& write, const Read& read, const Where& where) {
  const Collective lanes(*current->warp, ~0u, kLanes, where, [&](Meeting& meeting) {
    if (!meeting.shared) meeting.shared = std::make_shared<Shared>();
    write(*static_cast<Shared*>(meeting.shared.get()));
  });
  read(*static_cast<const Shared*>(lanes.shared()));
}

// Every lane of the mask hands in a value and receives that of lane `source`.
template <class T>
T exchange(unsigned mask, T value, unsigned source, const Where& where) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (!(mask >> current->lane & 1)) fail("a lane is outside its own mask: " + to_string(where));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  const Collective lanes(*current->warp, mask, __builtin_popcount(mask), where,
                         [&](Meeting& meeting) { meeting.values[current->lane] = word; });
  word = lanes.value(source);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// The running block's array of one declaration. 0xff bytes: NaN in every floating point type.
template <class T>
T* shared_array(const void* declaration, size_t count) {
  const Unwatched unwatched;
  auto& memory = current->block->shared[declaration];
  if (!memory) {
    memory.reset(::operator new(count * sizeof(T), FreeShared::kAlignment));
    std::memset(memory.get(), 0xff, count * sizeof(T));
  }
  return static_cast<T*>(memory.get());
}

inline void run_thread() {
  acquire(&launched->started);
  launched->kernel();
  const Unwatched unwatched;
  current->exited = true;
  release(&launched->ended);
}

template <class List>
void shuffle(List& list) {
  if (shuffle_seed) std::shuffle(list.begin(), list.end(), launched->random);
}

[[noreturn]] inline void fail_deadlock(const Block& block) {
  std::map<std::string, int> states;
  for (const auto& thread : block.threads) {
    ++states[thread->exited ? "exited" : "wait at " + to_string(thread->waiting->where)];
  }
  std::string message = "deadlock in block " + std::to_string(block.index.x);
  for (const auto& [state, threads] : states) {
    message += "; " + std::to_string(threads) + " threads " + state;
  }
  fail(message);
}

using Blocks = std::vector<std::unique_ptr<Block>>;

// Runs the blocks of a cluster.
inline Blocks run_blocks(const std::vector<uint3>& indices) {
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  Cluster cluster{{}, count * static_cast<unsigned>(indices.size())};
  Blocks blocks;
  std::vector<Thread*> order;
  for (const uint3& index : indices) {
    Block& block = *blocks.emplace_back(std::make_unique<Block>());
    block.index = index;
    block.cluster = &cluster;
    block.warps.resize((count + kLanes - 1) / kLanes);
    for (unsigned i = 0; i < count; ++i) {
      const uint3 at{i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
      block.threads.emplace_back(
          new Thread{&block, &block.warps[i / kLanes], at, i % kLanes, Fiber(run_thread)});
      order.push_back(block.threads.back().get());
    }
  }

  for (bool progress = true; progress;) {
    progress = false;
    shuffle(order);
    for (Thread* thread : order) {
      if (!thread->can_run()) continue;
      progress = true;
      current = thread;
      threadIdx = thread->index;
      blockIdx = thread->block->index;
      thread->fiber.resume();
    }
  }
  for (const auto& block : blocks) {
    const auto& threads = block->threads;
    if (!std::all_of(threads.begin(), threads.end(), [](auto& t) { return t->exited; })) {
      fail_deadlock(*block);
    }
  }
  return blocks;
}

// Runs `kernel` once per CUDA thread, a cluster of blocks at a time, and returns when all have
// ended.
inline void launch(dim3 grid, dim3 block, dim3 cluster, std::function<void()> kernel) {
  const Unwatched unwatched;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0 || threads == 0 || threads > 1024) {
    fail("bad launch: " + std::to_string(blocks) + " blocks of " + std::to_string(threads));
  }
  Launch launch{.kernel = std::move(kernel), .random = std::mt19937(shuffle_seed.value_or(0))};
  launched = &launch;
  gridDim = grid;
  blockDim = block;
  if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) {
    fail("bad launch: the grid is not made of whole clusters");
  }
  std::map<std::array<unsigned, 3>, std::vector<uint3>> clusters;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        clusters[{z / cluster.z, y / cluster.y, x / cluster.x}].push_back({x, y, z});
      }
    }
  }
  std::vector<std::vector<uint3>> order;
  for (auto& [at, indices] : clusters) order.push_back(std::move(indices));
  shuffle(order);
  release(&launch.started);
  // Blocks stay until the next ones have run: to the thread sanitizer a fiber made after another's
  // end may be the same thread, and a race between them none.
  Blocks previous;
  for (const auto& indices : order) previous = run_blocks(indices);
  acquire(&launch.ended);
}

}  // namespace simt
