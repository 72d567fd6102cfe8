// Puts the instructions of a program's segments into phases: what does not depend on one another is
// done together, stages above and below at a time.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "cuda/sweep_program.h"

namespace fastdni::cuda {

// The first phases in which a matrix may be read, and written.
struct MatrixUse {
  int32_t readable = 0, writable = 0;
};

class SegmentPhases {
 public:
  // The phase of the segment's next instruction, the earliest there is.
  int32_t next(const Instruction& op) {
    const bool in_place = op.op == Op::normalize || op.op == Op::normalize_gradient;
    std::vector<Operand> reads{op.a}, writes{op.out, op.dz};
    if (in_place) reads.push_back(op.out);
    (op.op == Op::normalize ? writes : reads).push_back(op.other);
    int32_t phase = 0;
    for (const Operand& read : reads) phase = std::max(phase, use(read).readable);
    for (const Operand& written : writes) phase = std::max(phase, use(written).writable);
    for (const Operand& read : reads) {
      use(read).writable = std::max(use(read).writable, phase + 1);
    }
    for (const Operand& written : writes) use(written) = {phase + 1, phase + 1};
    return phase;
  }

 private:
  MatrixUse& use(const Operand& operand) {
    if (operand.place == Place::none) return nothing_ = {};
    return uses_[{operand.place, operand.at}];
  }

  std::map<std::pair<Place, int64_t>, MatrixUse> uses_;
  MatrixUse nothing_;
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
