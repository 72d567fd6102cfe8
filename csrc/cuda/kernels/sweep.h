// The sweep's kernels: rows through a program, what joins them for BatchNorm, and the updates.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "common/optimizer.h"
#include "cuda/kernels/sweep_program.h"

namespace fastdni::cuda {

constexpr int kSweepThreads = 256;
// Columns of a weight's gradient that a block makes, of kSweepRows rows.
constexpr int kUpdateColumns = 64;
// Stages and one above that a mask has room for.
constexpr int kSweepStages = 4096;

struct StageMask {
  uint32_t words[kSweepStages / 32] = {};

  void set(int stage) { words[stage / 32] |= 1u << stage % 32; }
  FASTDNI_HOST_DEVICE bool has(int stage) const { return words[stage / 32] >> stage % 32 & 1; }
};

// A parameter, and what its optimizer keeps (null where it does not).
template <class T>
struct SweepParameter {
  T* value;
  T* first;
  T* second;
  Update<T> update;
  // What `update` is made of on the GPU, where the step count (raised then) or the learning rate
  // is there.
  OptimizerSettings settings;
  double count;
  DeviceNumber step, lr;

  bool operator==(const SweepParameter&) const = default;
};

// One tile of a job.
struct Task {
  int32_t job, output, input;  // output, input: of the tile's first
};

// A program and the memory of a step; every pointer is one of the device.
template <class T>
struct SweepStep {
  const Instruction* instructions;
  const Reduction* reductions;
  const Job* jobs;
  const Task* tasks;
  const Loss* losses;  // of the synthesizers
  int32_t task_count, loss_count, parameter_count;
  int32_t bias_task_count;  // the first of the tasks
  bool prepares;            // some parameter has a number on the GPU
  Loss criterion_loss;
  int64_t label_counts = -1;  // as in the program

  T* workspace;
  SweepParameter<T>* parameters;
  void* const* statistics;
  const T* x;              // (B, K)
  const T* network_input;  // (B, K), where input synthesizers predict from another tensor than x
  const T* context;        // (B, C), or null for one-hot labels
  const void* target;      // (B,) int64, or (B, N) where the criterion is mse
  const T* gradient;       // (B, N), from the stage above
  T* output;               // (B, N)
  T* loss;                 // (), null where there is none, or it is launch_sweep_loss's
  T* synthesis_loss;       // (synthesizers,)
  T* input_gradient;       // (B, K)
  StageMask active;
  int64_t batch;
  double divisor;   // of the synthesis losses
  T scale;          // 2 / divisor
  int32_t outputs;  // N
  Criterion criterion;
  Precision precision;
};

// Where an operand lies: of a parameter its value, which only a GPU can look up.
template <class T>
FASTDNI_HOST_DEVICE T* resolve(const SweepStep<T>& step, const Operand& operand) {
  switch (operand.place) {
    case Place::workspace:
      return step.workspace + operand.at;
    case Place::parameter:
      return step.parameters[operand.at].value;
    case Place::x:
      return const_cast<T*>(step.x);  // only ever read
    case Place::network_input:
      return const_cast<T*>(step.network_input);
    case Place::context:
      return const_cast<T*>(step.context);
    case Place::gradient:
      return const_cast<T*>(step.gradient);
    case Place::output:
      return step.output;
    case Place::input_gradient:
      return step.input_gradient;
    case Place::address:
      return reinterpret_cast<T*>(static_cast<intptr_t>(operand.at));
    default:
      return nullptr;
  }
}

// Those that have biases, too, first.
std::vector<Task> sweep_tasks(const SweepProgram& program);
int64_t sweep_bias_tasks(const SweepProgram& program);

// How a program's segments are spread over a GPU. The bits are the same.
enum class Spread {
  rows,      // one launch a segment, a block for every kSweepRows rows
  clusters,  // one launch a segment, for every kSweepRows rows a cluster of blocks
  phases,    // one launch a phase, for every kSweepRows rows a block for each tile
};
// The largest cluster that every GPU with clusters takes.
constexpr int kSweepCluster = 8;
// Blocks of a program's clusters: no more than have something to do at some time.
int sweep_cluster(const SweepProgram& program);
// Whether the current GPU takes clusters of that many of the sweep's blocks.
template <class T>
bool sweep_clusters(Precision precision, int blocks);

// Bytes that travel with a launch.
struct SweepBytes {
  static constexpr size_t kMost = 3840;  // a launch takes 4096 with all that it is given
  uint32_t words[kMost / sizeof(uint32_t)];
};

// Writes bytes of the host into device memory, both 4-byte aligned. They travel with the launches:
// a copy might wait, or be made by a graph's replay when the host's memory holds something else.
cudaError_t launch_sweep_write(void* to, const void* bytes, size_t count, cudaStream_t stream);

// Makes a product in the stream of the launches.
using Library = std::function<void(const LibraryProduct&)>;

// F, S and D of every stage.
template <class T>
cudaError_t launch_sweep_forward(const SweepStep<T>& step, const SweepProgram& program,
                                 Spread spread, const Library& library, cudaStream_t stream);

// The topmost synthesizer's errors, once `gradient` is there.
template <class T>
cudaError_t launch_sweep_regression(const SweepStep<T>& step, const SweepProgram& program,
                                    Spread spread, const Library& library, cudaStream_t stream);

// The loss of the criterion, where it is wanted before the update.
template <class T>
cudaError_t launch_sweep_loss(const SweepStep<T>& step, cudaStream_t stream);

// Every update, and the losses.
template <class T>
cudaError_t launch_sweep_update(const SweepStep<T>& step, const SweepProgram& program,
                                const Library& library, cudaStream_t stream);

}  // namespace fastdni::cuda
