// Leaves a program's large products to torch's library.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "cuda/kernels/sweep_program.h"

namespace fastdni::cuda {

// Rows from which on the library makes every gradient of a weight: it divides long sums among
// blocks, where one of ours goes through all rows, which also loses digits. Estimated, not
// measured.
constexpr int64_t kLongBatch = 16384;

class LibraryProducts {
 public:
  // Large are those of `from` multiply-adds and more; the most there are: none are.
  LibraryProducts(SweepProgram& program, int64_t batch, int64_t from)
      : program_(program), batch_(batch), from_(from) {}

  void hand_over() {
    cut(program_.forward);
    cut(program_.regression);
    place_products();
    take_gradients();
  }

 private:
  bool is_large(int64_t rows, int64_t columns, int64_t depth) const {
    return static_cast<double>(rows) * columns * depth >= static_cast<double>(from_);
  }

  // Cuts the segments in front of large products: the library makes them, and the instruction goes
  // on from there.
  void cut(std::vector<Segment>& segments) {
    std::vector<Segment> pieces;
    const auto add = [&](const Segment& segment) {
      if (segment.first < segment.last || segment.reduce_first < segment.reduce_last) {
        pieces.push_back(segment);
      }
    };
    for (Segment segment : segments) {
      for (int32_t i = segment.first; i < segment.last; ++i) {
        Instruction& op = program_.instructions[i];
        if (op.op != Op::product || op.weight.place == Place::none) continue;
        if (!is_large(batch_, op.columns, op.depth)) continue;
        Segment before = segment;
        before.last = i;
        add(before);
        LibraryProduct made;
        made.a = op.a;
        made.b = op.weight;
        made.rows = batch_;
        made.columns = op.columns;
        made.depth = op.depth;
        made.b_transposed = !op.transposed;
        made.stage = op.stage;
        scratch_columns_ = std::max<int64_t>(scratch_columns_, op.columns);
        const auto number = static_cast<int32_t>(program_.library.size());
        program_.library.push_back(made);
        segment = {segment.reduce_last, segment.reduce_last, number, number + 1, i, segment.last};
        op.weight = {};
      }
      add(segment);
    }
    segments = std::move(pieces);
  }

  // They are made one after the other in one place: what it holds is used before the next.
  void place_products() {
    if (program_.library.empty()) return;
    const Operand scratch = program_.allocate(batch_ * scratch_columns_);
    for (const std::vector<Segment>* segments : {&program_.forward, &program_.regression}) {
      for (const Segment& segment : *segments) {
        if (segment.library_first == segment.library_last) continue;
        program_.library[segment.library_first].out = scratch;
        program_.instructions[segment.first].a = scratch;
      }
    }
  }

  void take_gradients() {
    const bool is_long = batch_ >= kLongBatch && from_ < std::numeric_limits<int64_t>::max();
    for (Job& job : program_.jobs) {
      const bool given = job.ready.place != Place::none || job.input.place == Place::context;
      if (given || !(is_long || is_large(job.outputs, job.inputs, batch_))) continue;
      LibraryProduct made;
      made.a = job.grad;
      made.b = job.input;
      made.out = job.ready = program_.allocate(static_cast<int64_t>(job.outputs) * job.inputs);
      made.rows = job.outputs;
      made.columns = job.inputs;
      made.depth = batch_;
      made.a_transposed = true;
      made.stage = job.stage;
      made.parameter = job.weight;
      program_.gradients.push_back(made);
    }
  }

  SweepProgram& program_;
  int64_t batch_, from_, scratch_columns_ = 0;
};

}  // namespace fastdni::cuda
