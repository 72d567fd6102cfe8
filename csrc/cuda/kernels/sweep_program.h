// The sweep as a program for a GPU: instructions that each work on rows of their own, what has to
// wait for all rows in between (BatchNorm alone does), and the jobs of the update. Made once for a
// network and a batch (sweep_builder.h); knows no addresses, only places.
#pragma once
#include <cstdint>
#include <vector>

#include "common/network.h"

namespace fastdni::cuda {

// Rows of a block.
constexpr int kSweepRows = 16;
// Columns that a block computes at a time, and those that it takes moments of.
constexpr int kSweepColumns = 64;
constexpr int kMomentColumns = 256;
FASTDNI_HOST_DEVICE constexpr int column_tiles(int64_t columns, int width = kSweepColumns) {
  return static_cast<int>((columns + width - 1) / width);
}
// Labels that every block of rows counts for itself.
constexpr int kCountedLabels = 4096;
// Rows of a column that a block sums by itself.
constexpr int kSummedRows = 4096;

enum class Place : int32_t {
  none,
  workspace,
  parameter,
  x,
  network_input,
  context,  // as given, or one-hot labels
  gradient,
  output,
  input_gradient,
  address,  // anywhere: `at` is the address itself
};

// A matrix of a step; its rows follow one another without gaps.
struct Operand {
  Place place = Place::none;
  int64_t at = 0;  // workspace: of the first element; parameter: its number

  static Operand address(const void* pointer) {
    if (pointer == nullptr) return {};
    return {Place::address, static_cast<int64_t>(reinterpret_cast<intptr_t>(pointer))};
  }
};

enum class Op : int32_t {
  product,           // c = a w^T + ctx q^T (or a w; without a weight c = a), and `finish`
  criterion,         // the gradient of the loss at h = a goes to `out`, its rows' sums to partials
  moments,           // of the columns of a: means, then squares around them, to partials
  normalize,         // z = out becomes normalised, other = phi(gamma z + beta)
  gradient_moments,  // sums of du = a and of du z (z = other), to partials
  normalize_gradient,  // du = out becomes dz
};

enum class Finish : int32_t {
  activate,       // out = phi(c + b + q)
  synthesize,     // out = c + b + q, a prediction of the gradient; dz = out phi'(other)
  differentiate,  // out = c phi'(other), from other = phi(..)
  regress,        // e = other - c; out = scale e, the sum of e^2 to partials; dz = e if it is wanted
};

struct Instruction {
  Op op = Op::product;
  int32_t stage = -1;  // is left out where this stage is masked; -1: never
  // Those of a phase do not depend on one another; a phase begins when the one before is done.
  int32_t phase = 0;
  int32_t columns = 0;
  Operand a, out, other, dz;
  Activation activation = Activation::identity;

  // Of a product. Weight (columns, depth); (depth, columns) where it is `transposed`.
  Finish finish = Finish::activate;
  int32_t depth = 0;
  bool transposed = false;
  Operand weight, bias, second_bias;
  int32_t context = 0;  // its width; 0: none
  Operand context_weight;

  // The pieces that blocks share among them.
  FASTDNI_HOST_DEVICE int32_t tiles() const {
    if (op == Op::criterion) return 1;
    const bool moments = op == Op::moments || op == Op::gradient_moments;
    return column_tiles(columns, moments ? kMomentColumns : kSweepColumns);
  }

  // In the workspace. Of a product and the criterion a number for each row block and kSweepColumns
  // columns; of moments two rows of `columns` for each row block.
  int64_t partials = -1;
  // Of BatchNorm: rows of `columns`: mean, 1 / sqrt(variance + eps), sum of du, sum of du z.
  int64_t statistics = -1;
};

// What waits for all rows: joins the partial moments of a BatchNorm.
struct Reduction {
  int32_t stage = 0;
  int32_t columns = 0;
  bool of_gradient = false;
  int64_t partials = 0, statistics = 0;
  int32_t running = -1;  // number of the running mean; variance and count follow
  double momentum = 0;   // negative: plain averages
  double eps = 0;
};

// Instructions [first, last), phase after phase, after the reductions [reduce_first, reduce_last)
// and the products [library_first, library_last) of torch's library.
struct Segment {
  int32_t reduce_first = 0, reduce_last = 0;
  int32_t library_first = 0, library_last = 0;
  int32_t first = 0, last = 0;
};

// out (rows, columns) = a (rows, depth) b (depth, columns), each as it is or transposed in memory.
struct LibraryProduct {
  Operand a, b, out;
  int64_t rows = 0, columns = 0, depth = 0;
  bool a_transposed = false, b_transposed = false;
  int32_t stage = -1;      // is left out where this stage is masked; -1: never
  int32_t parameter = -1;  // of a gradient: the weight's number
};

// grad^T input is a weight's gradient (unless `ready` holds it already), the columns' sums of grad
// that of its biases; of a long batch sums of kSummedRows rows each go to `sums` first.
struct Job {
  Operand grad, input, ready, sums;
  int32_t outputs = 0, inputs = 0;
  int32_t weight = -1, bias = -1, second_bias = -1;  // numbers of parameters
  int32_t stage = 0;
};

// A loss: the sum of partial sums over a divisor.
struct Loss {
  int32_t stage = -1;  // NaN where it is masked
  int64_t partials = 0;
  int64_t count = 0;
};

struct SweepProgram {
  std::vector<Instruction> instructions;
  std::vector<Reduction> reductions;
  std::vector<Segment> forward, regression;  // the latter once the gradient from above is there
  std::vector<LibraryProduct> library;       // of the segments
  std::vector<LibraryProduct> gradients;     // of weights, before the jobs
  std::vector<Job> jobs;
  Loss criterion;
  int64_t label_counts = -1;    // in the workspace, of every kCountedLabels where there are more
  std::vector<Loss> synthesis;  // gradients', then inputs'
  int64_t workspace = 0;        // elements
  int64_t row_blocks = 0;
  int64_t summed_pieces = 0;       // of a long batch
  int32_t phases = 0, widest = 0;  // their number, and the most tiles of one

  Operand allocate(int64_t elements) {
    const Operand made{Place::workspace, workspace};
    workspace += (elements + 3) / 4 * 4;  // 16-byte loads of float
    return made;
  }
};

}  // namespace fastdni::cuda
