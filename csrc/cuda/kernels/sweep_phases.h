// Puts the instructions of a program's segments into phases: what does not depend on one another is
// done together, stages above and below at a time.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "cuda/kernels/sweep_program.h"

namespace fastdni::cuda {

// The first phases in which a matrix may be read, and written.
struct Access {
  int32_t readable = 0, writable = 0;
};

// A matrix is known by where it begins: none is part of another. What an instruction finds besides
// (partial sums, for losses and for reductions) is read in a later launch, and what reductions have
// joined was there before the segment.
class SegmentPhases {
 public:
  // The phase of the segment's next instruction, the earliest there is.
  int32_t next(const Instruction& op) {
    const bool in_place = op.op == Op::normalize || op.op == Op::normalize_gradient;
    std::vector<Operand> reads{op.a}, writes{op.out, op.dz};
    if (in_place) reads.push_back(op.out);
    (op.op == Op::normalize ? writes : reads).push_back(op.other);
    std::erase_if(reads, is_none);
    std::erase_if(writes, is_none);
    int32_t phase = 0;
    for (const Operand& read : reads) phase = std::max(phase, access(read).readable);
    for (const Operand& written : writes) phase = std::max(phase, access(written).writable);
    for (const Operand& read : reads) {
      access(read).writable = std::max(access(read).writable, phase + 1);
    }
    for (const Operand& written : writes) access(written) = {phase + 1, phase + 1};
    return phase;
  }

 private:
  static bool is_none(const Operand& operand) { return operand.place == Place::none; }
  Access& access(const Operand& operand) { return accesses_[{operand.place, operand.at}]; }

  std::map<std::pair<Place, int64_t>, Access> accesses_;
};

inline void arrange_phases(SweepProgram& program) {
  for (const std::vector<Segment>* segments : {&program.forward, &program.regression}) {
    for (const Segment& segment : *segments) {
      SegmentPhases phases;
      const auto first = program.instructions.begin() + segment.first;
      const auto last = program.instructions.begin() + segment.last;
      for (auto op = first; op != last; ++op) op->phase = phases.next(*op);
      std::stable_sort(first, last, [](const Instruction& a, const Instruction& b) {
        return a.phase < b.phase;
      });
    }
  }
}

// The end of the phase that begins with an instruction of a segment.
inline int32_t phase_end(const SweepProgram& program, const Segment& segment, int32_t first) {
  int32_t end = first + 1;
  while (end < segment.last &&
         program.instructions[end].phase == program.instructions[first].phase) {
    ++end;
  }
  return end;
}

inline int32_t phase_tiles(const SweepProgram& program, int32_t first, int32_t last) {
  int32_t tiles = 0;
  for (int32_t i = first; i < last; ++i) tiles += program.instructions[i].tiles();
  return tiles;
}

inline void count_phases(SweepProgram& program) {
  for (const std::vector<Segment>* segments : {&program.forward, &program.regression}) {
    for (const Segment& segment : *segments) {
      for (int32_t i = segment.first; i < segment.last;) {
        const int32_t end = phase_end(program, segment, i);
        program.widest = std::max(program.widest, phase_tiles(program, i, end));
        ++program.phases;
        i = end;
      }
    }
  }
}

}  // namespace fastdni::cuda
