// The sweep's ops, the same for every device: what runs is the plan's own.
#pragma once
#include "ops/tensor.h"

namespace fastdni {

// For a backend's driver: implements them for the dispatch key of `m`.
void implement_sweep(torch::stable::detail::StableLibrary& m);

}  // namespace fastdni
