// Named ranges for torch.profiler (and NVTX, where it emits those): what a step's phases take.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace fastdni {

// From here to the end of the scope. Costs nothing to speak of while nobody is profiling.
class Range {
 public:
  explicit Range(const char* name) {
    if (aoti_record_function_start(name, nullptr, nullptr, 0, &handle_) != 0) handle_ = nullptr;
  }
  ~Range() {
    if (handle_ != nullptr) aoti_record_function_end(handle_);
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  AtenRecordFunctionHandle handle_ = nullptr;
};

}  // namespace fastdni
