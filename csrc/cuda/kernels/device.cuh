// What device code needs beyond <cuda_runtime.h>.
#pragma once
#include <cuda_runtime.h>

// An array in shared memory, aligned for vectors: FASTDNI_SHARED(float, warp_sums, 8) declares
// warp_sums[8]. The host run (tests/simt) defines it first, to give every block an array of its own
// that is watched for accesses out of bounds.
#ifndef FASTDNI_SHARED
#define FASTDNI_SHARED(type, name, count) alignas(16) __shared__ type name[count]
#endif
