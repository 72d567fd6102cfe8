// Stands for CUDA's header of the same name: the types that a launcher's declaration needs.
#pragma once
#include <cstdlib>

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0 };

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

#if defined(SIMT_EMULATED)
extern "C" {  // tests/emulated/runtime.cpp
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
}
#else
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }

// With SIMT_CAPTURED a launch is taken for part of a graph (and made all the same).
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = std::getenv("SIMT_CAPTURED") == nullptr ? cudaStreamCaptureStatusNone
                                                    : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
