// What a GPU charges for the ways to divide a step: prints one JSON object of seconds (and bytes per
// second). Built and run by benchmarks/gpu.py; knows nothing of fastdni.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "device_constants: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

constexpr int kRounds = 1000;

__global__ void nothing() {}

__global__ void grid_barriers(int rounds) {
  const auto grid = cooperative_groups::this_grid();
  for (int i = 0; i < rounds; ++i) grid.sync();
}

// Two blocks hand a flag to each other, there and back, `rounds` times.
__global__ void hand_over(volatile int* flags, int rounds) {
  if (threadIdx.x != 0) return;
  volatile int* own = flags + blockIdx.x * 32;
  volatile int* other = flags + (1 - blockIdx.x) * 32;
  for (int i = 1; i <= rounds; ++i) {
    if (blockIdx.x == 0) {
      *other = i;
      __threadfence();
      while (*own < i) {
      }
    } else {
      while (*own < i) {
      }
      *other = i;
      __threadfence();
    }
  }
}

__global__ void cluster_barriers(int rounds) {
#if __CUDA_ARCH__ >= 900
  for (int i = 0; i < rounds; ++i) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
#endif
}

// Seconds on the device, the median of several runs after one to warm up.
double timed(cudaStream_t stream, const std::function<void()>& run) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> found;
  for (int i = 0; i < 8; ++i) {
    check(cudaEventRecord(begin, stream), "record");
    run();
    check(cudaEventRecord(end, stream), "record");
    check(cudaEventSynchronize(end), "run");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "elapsed");
    if (i > 0) found.push_back(milliseconds);
  }
  std::sort(found.begin(), found.end());
  return found[found.size() / 2] * 1e-3;
}

void print(const char* name, double value) { std::printf(",\n \"%s\": %.4g", name, value); }

}  // namespace

int main() {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "device");
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "stream");
  std::printf("{\"multiprocessors\": %d", properties.multiProcessorCount);

  const auto launches = [&] {
    for (int i = 0; i < kRounds; ++i) nothing<<<1, 32, 0, stream>>>();
  };
  print("launch_on_the_device", timed(stream, launches) / kRounds);
  const auto before = std::chrono::steady_clock::now();
  launches();
  const std::chrono::duration<double> host = std::chrono::steady_clock::now() - before;
  print("launch_on_the_host", host.count() / kRounds);
  check(cudaStreamSynchronize(stream), "launches");

  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  launches();
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&executable, graph, 0), "graph");
  print("graph_node", timed(stream, [&] { cudaGraphLaunch(executable, stream); }) / kRounds);

  int rounds = kRounds;
  void* arguments[] = {&rounds};
  print("grid_barrier", timed(stream, [&] {
          cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_barriers),
                                      dim3(properties.multiProcessorCount), dim3(256), arguments, 0,
                                      stream);
        }) / kRounds);

  int* flags;
  check(cudaMalloc(&flags, 64 * sizeof(int)), "memory");
  print("flag_hand_off", timed(stream, [&] {
          cudaMemsetAsync(flags, 0, 64 * sizeof(int), stream);
          void* both[] = {&flags, &rounds};
          // Cooperative, so that both blocks are there at once.
          cudaLaunchCooperativeKernel(reinterpret_cast<void*>(hand_over), dim3(2), dim3(32), both,
                                      0, stream);
        }) / kRounds / 2);

  if (properties.major >= 9) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(8 * (properties.multiProcessorCount / 16));
    config.blockDim = dim3(256);
    config.stream = stream;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = 8;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
    print("cluster_barrier",
          timed(stream, [&] { cudaLaunchKernelEx(&config, cluster_barriers, rounds); }) / kRounds);
  }

  const size_t bytes = size_t{1} << 30;
  char *from, *to;
  check(cudaMalloc(&from, bytes), "memory");
  check(cudaMalloc(&to, bytes), "memory");
  check(cudaMemset(from, 1, bytes), "memory");
  const double seconds = timed(
      stream, [&] { cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream); });
  print("copy_bytes_per_second", 2.0 * bytes / seconds);
  check(cudaDeviceSynchronize(), "end");
  std::printf("}\n");
}
