// A GPU that is none: as much of CUDA's runtime, driver and cuBLAS as torch and fastdni ask for, on
// the host, in a library that is loaded before theirs.
//
// What it models:
//   - asynchrony: work waits in its stream until somebody must wait for it, and only events order
//     the streams (EMULATED_ORDER=random: some of it, anywhere, is done whenever the runtime is
//     asked for something; EMULATED_SEED says which);
//   - memory: NaN when it is new; a host that follows a pointer to it, and work of one GPU that
//     follows a pointer to another's, faults as on a machine with GPUs;
//   - captures: what they forbid is refused, what they record is done when the graph is launched;
//   - kernels of fastdni (tests/simt), and products of cuBLAS as far as fastdni's ops need them.
// What it does not: kernels of torch (ops.py takes CPU's), work that runs at the same time, time.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <library_types.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Work = std::function<void()>;

constexpr int kDevices = 2;
constexpr int kMultiprocessors = 132, kSharedPerBlock = 227 << 10;  // an H100's
constexpr int kVersion = 13000;

// Of everything here. The host's threads take turns; work is done by whoever waits for it.
std::recursive_mutex mutex;

class Lock {
 public:
  // A thread does not wait with Python's lock in its hands: Python's work may be at work.
  Lock() {
    if (mutex.try_lock()) return;
    static const auto holds = python<int (*)()>("PyGILState_Check");
    static const auto release = python<void* (*)()>("PyEval_SaveThread");
    static const auto restore = python<void (*)(void*)>("PyEval_RestoreThread");
    void* thread = holds && holds() ? release() : nullptr;
    mutex.lock();
    if (thread) restore(thread);
  }
  ~Lock() { mutex.unlock(); }
  Lock(const Lock&) = delete;

 private:
  template <class Function>
  static Function python(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
  }
};

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "emulated GPU: %s\n", what.c_str());
  std::abort();
}

// ---- memory ----

// The address space of a device's memory, which can be read and written while it works only.
class Arena {
 public:
  static constexpr size_t kBytes = size_t{6} << 30;

  Arena() {
    void* mapped = mmap(nullptr, kBytes + kPage, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) die("no address space");
    base_ = static_cast<char*>(mapped) + kPage - reinterpret_cast<uintptr_t>(mapped) % kPage;
    madvise(base_, kBytes, MADV_HUGEPAGE);  // few pages to open and close
  }

  // Null where there is no more.
  void* take(size_t bytes) {
    bytes = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
    size_t at = 0;  // the first gap that is large enough
    for (const auto& [offset, size] : taken_) {
      if (offset - at >= bytes) break;
      at = offset + size;
    }
    if (at + bytes > kBytes) return nullptr;
    taken_[at] = bytes;
    end_ = std::max(end_, at + bytes);
    if (opened_) protect();
    return base_ + at;
  }
  // Returns how many bytes they were.
  size_t give_back(const void* pointer) {
    const auto found = taken_.find(static_cast<const char*>(pointer) - base_);
    if (found == taken_.end()) die("memory freed twice");
    const size_t bytes = found->second;
    return taken_.erase(found), bytes;
  }
  size_t used() const {
    size_t sum = 0;
    for (const auto& [offset, bytes] : taken_) sum += bytes;
    return sum;
  }
  bool has(const void* pointer) const { return pointer >= base_ && pointer < base_ + kBytes; }

  void open() {
    if (opened_++ == 0) protect();
  }
  void close() {
    if (--opened_ == 0) protect();
  }

 private:
  static constexpr size_t kPage = 2 << 20;

  void protect() const { mprotect(base_, end_, opened_ ? PROT_READ | PROT_WRITE : PROT_NONE); }

  char* base_;
  std::map<size_t, size_t> taken_;  // offset -> bytes
  size_t end_ = 0;                  // of what was ever taken
  int opened_ = 0;
};

Arena& arena(int device) {
  static Arena arenas[kDevices];
  return arenas[device];
}

// -1: the host's.
int device_of(const void* pointer) {
  for (int device = 0; device < kDevices; ++device) {
    if (arena(device).has(pointer)) return device;
  }
  return -1;
}

class Opened {
 public:
  explicit Opened(int device) : device_(device) {
    if (device_ >= 0) arena(device_).open();
  }
  ~Opened() {
    if (device_ >= 0) arena(device_).close();
  }
  Opened(const Opened&) = delete;

 private:
  Lock lock_;
  int device_;
};

// ---- streams, events, captures ----

struct Stream;

struct Graph {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::set<Stream*> streams;     // those that take part in its capture
  std::set<Stream*> unjoined{};  // of them those that the first one does not wait for yet
  std::vector<Work> recorded{};  // in an order that was possible
  bool broken = false;
};

struct Event {
  Stream* stream = nullptr;
  uint64_t recorded = 0, done = 0;  // how often
  Graph* graph = nullptr;           // recorded last in its capture
};

// Work; or an event to record or to wait for, the number-th time.
struct Task {
  Work work{};
  std::shared_ptr<Event> event{};
  uint64_t number = 0;
  bool records = false;
};

struct Stream {
  int device;
  std::deque<Task> queue{};
  Graph* graph = nullptr;  // that is being captured
};

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
std::set<Stream*> streams;
std::set<Graph*> captured;
std::map<cudaEvent_t, std::shared_ptr<Event>> events;
unsigned long long graphs_begun = 0;
std::map<std::string, uint64_t> counts;  // launches, allocations, waits

cudaError_t failed(cudaError_t error) { return last_error = error; }

Stream* stream_of(cudaStream_t handle) {
  static Stream* defaults[kDevices] = {};
  if (reinterpret_cast<uintptr_t>(handle) <= 2) {  // the default one, by its names
    Stream*& own = defaults[current_device];
    if (!own) streams.insert(own = new Stream{current_device});
    return own;
  }
  auto* stream = reinterpret_cast<Stream*>(handle);
  if (!streams.contains(stream)) die("a stream that does not exist");
  return stream;
}

void run_until(Event& event, uint64_t number);

// The next task of a stream; false where there is none.
bool run_one(Stream* stream) {
  if (stream->queue.empty()) return false;
  const Task task = std::move(stream->queue.front());
  stream->queue.pop_front();
  if (task.records) {
    task.event->done = std::max(task.event->done, task.number);
  } else if (task.event) {
    run_until(*task.event, task.number);
  } else {
    const Opened opened(stream->device);
    task.work();
  }
  return true;
}

void run_until(Event& event, uint64_t number) {
  while (event.done < number) {
    if (!run_one(event.stream)) die("an event that is never recorded");
  }
}

void drain(Stream* stream) {
  while (run_one(stream)) {
  }
}

void drain(int device) {
  for (Stream* stream : std::vector<Stream*>(streams.begin(), streams.end())) {
    if (stream->device == device) drain(stream);
  }
}

// What may have been done meanwhile whenever the runtime is asked for something.
void progress() {
  static const char* const order = std::getenv("EMULATED_ORDER");
  static const char* const seed = std::getenv("EMULATED_SEED");
  static std::mt19937 random(seed ? std::atoi(seed) : 0);
  if (order == nullptr || std::string(order) != "random" || streams.empty()) return;
  const std::vector<Stream*> all(streams.begin(), streams.end());
  for (unsigned i = random() % 3; i > 0; --i) run_one(all[random() % all.size()]);
}

void enqueue(Stream* stream, Task task) {
  stream->queue.push_back(std::move(task));
  progress();
}

cudaError_t send(cudaStream_t handle, Work work) {
  const Lock lock;
  Stream* stream = stream_of(handle);
  if (stream->device != current_device) return failed(cudaErrorInvalidResourceHandle);
  if (stream->graph) {
    stream->graph->recorded.push_back(std::move(work));
  } else {
    enqueue(stream, {.work = std::move(work)});
  }
  return cudaSuccess;
}

// Refuses what a capture forbids: to wait for a stream that captures or, without a stream, anything
// that could wait, while a capture is to be kept from it.
cudaError_t refused(const char* what, Stream* stream = nullptr) {
  Graph* graph = stream ? stream->graph : nullptr;
  if (!stream && thread_mode != cudaStreamCaptureModeRelaxed) {
    for (Graph* each : captured) {
      if (each->mode == cudaStreamCaptureModeGlobal) graph = each;
    }
  }
  if (!graph) return cudaSuccess;
  graph->broken = true;
  std::fprintf(stderr, "emulated GPU: %s during a capture\n", what);
  return failed(cudaErrorStreamCaptureUnsupported);
}

}  // namespace

#define REFUSE_IN_CAPTURE(...)                                              \
  do {                                                                      \
    const cudaError_t error = refused(__func__ __VA_OPT__(, ) __VA_ARGS__); \
    if (error != cudaSuccess) return error;                                 \
  } while (false)

// ---- what tests and their stand-ins for kernels ask for ----

EXPORT cudaError_t emulated_launch(cudaStream_t stream, Work* work) {
  ++counts["launches"];
  return send(stream, [owned = std::shared_ptr<Work>(work)] { (*owned)(); });
}

// Python's work. `call` is given the number when it is to be done.
EXPORT cudaError_t emulated_send(cudaStream_t stream, void (*call)(int64_t), int64_t number) {
  return send(stream, [=] { call(number); });
}

EXPORT void emulated_drain(cudaStream_t stream) {
  const Lock lock;
  drain(stream_of(stream));
}

// Between these two the host may touch a device's memory.
EXPORT void emulated_open(int device) {
  const Lock lock;
  arena(device).open();
}
EXPORT void emulated_close(int device) {
  const Lock lock;
  arena(device).close();
}

EXPORT uint64_t emulated_count(const char* of) {
  const Lock lock;
  return counts[of];
}

// ---- devices ----

EXPORT cudaError_t cudaGetDeviceCount(int* count) { return *count = kDevices, cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return failed(cudaErrorInvalidDevice);
  return current_device = device, cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "Emulated GPU");
  properties->major = 9;
  properties->totalGlobalMem = Arena::kBytes;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = properties->sharedMemPerMultiprocessor = kSharedPerBlock;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->multiProcessorCount = kMultiprocessors;
  properties->maxGridSize[0] = INT32_MAX;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->l2CacheSize = 50 << 20;
  properties->unifiedAddressing = 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> known{
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrMultiProcessorCount, kMultiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, kSharedPerBlock},
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrWarpSize, 32},
  };
  const auto found = known.find(attribute);
  *value = found == known.end() ? 0 : found->second;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  std::snprintf(id, length, "0000:%02x:00.0", device);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
EXPORT cudaError_t cudaDriverGetVersion(int* version) { return *version = kVersion, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return *version = kVersion, cudaSuccess; }
EXPORT cudaError_t cudaDeviceSynchronize() {
  const Lock lock;
  REFUSE_IN_CAPTURE();
  ++counts["waits"];
  drain(current_device);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORT const char* cudaGetErrorString(cudaError_t error) {
  static thread_local char text[64];
  std::snprintf(text, sizeof text, "error %d of the emulated GPU", error);
  return text;
}
EXPORT const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* status) {
  *function = nullptr;
  if (status) *status = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, thread_mode), cudaSuccess;
}

// ---- memory ----

EXPORT cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  const Lock lock;
  REFUSE_IN_CAPTURE();
  ++counts["allocations"];
  progress();
  *pointer = arena(current_device).take(bytes);
  if (!*pointer) return failed(cudaErrorMemoryAllocation);
  const Opened opened(current_device);
  std::memset(*pointer, 0xff, bytes);  // NaN
  return cudaSuccess;
}
EXPORT cudaError_t cudaFree(void* pointer) {
  const Lock lock;
  if (!pointer) return cudaSuccess;
  REFUSE_IN_CAPTURE();
  const int device = device_of(pointer);
  if (device < 0) return failed(cudaErrorInvalidValue);
  drain(device);
  const Opened opened(device);
  std::memset(pointer, 0xff, arena(device).give_back(pointer));  // whoever still reads it gets NaN
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Lock lock;
  *total = Arena::kBytes;
  *free = *total - arena(current_device).used();
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return *pointer = std::malloc(bytes), cudaSuccess;
}
EXPORT cudaError_t cudaFreeHost(void* pointer) { return std::free(pointer), cudaSuccess; }
EXPORT cudaError_t cudaHostRegister(void*, size_t, unsigned) { return cudaSuccess; }
EXPORT cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* at) {
  *attributes = {};
  const int device = device_of(at);
  if (device < 0) return cudaSuccess;
  attributes->type = cudaMemoryTypeDevice;
  attributes->device = device;
  attributes->devicePointer = const_cast<void*>(at);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  if (device_of(from) >= 0) {
    return send(stream, [=] {
      const Opened source(device_of(from)), target(device_of(to));
      std::memmove(to, from, bytes);
    });
  }
  // The host's memory is read before the call returns.
  auto staged = std::make_shared<std::vector<char>>(bytes);
  std::memcpy(staged->data(), from, bytes);
  return send(stream, [=] { std::memcpy(to, staged->data(), bytes); });
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                       cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const Lock lock;
  REFUSE_IN_CAPTURE();
  ++counts["waits"];
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  drain(stream_of(nullptr));
  return error;
}
EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return send(stream, [=] { std::memset(to, value, bytes); });
}

// ---- streams and events ----

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  const Lock lock;
  auto* made = new Stream{current_device};
  streams.insert(made);
  return *stream = reinterpret_cast<cudaStream_t>(made), cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const Lock lock;
  Stream* stream = stream_of(handle);
  drain(stream);
  return streams.erase(stream), cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  return *priority = 0, cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  const Lock lock;
  Stream* stream = stream_of(handle);
  REFUSE_IN_CAPTURE(stream);
  ++counts["waits"];
  drain(stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const Lock lock;
  Stream* stream = stream_of(handle);
  REFUSE_IN_CAPTURE(stream);
  progress();
  return stream->queue.empty() ? cudaSuccess : cudaErrorNotReady;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t waited, unsigned) {
  const Lock lock;
  const std::shared_ptr<Event> event = events.at(waited);
  Stream* stream = stream_of(handle);
  if (Graph* graph = event->graph) {  // the stream takes part in that capture from now on
    if (stream->graph && stream->graph != graph) return failed(cudaErrorStreamCaptureMerge);
    if (!stream->graph) graph->unjoined.insert(stream);
    graph->unjoined.erase(event->stream);
    graph->streams.insert(stream);
    stream->graph = graph;
  } else if (stream->graph) {
    stream->graph->broken = true;
    return failed(cudaErrorStreamCaptureIsolation);
  } else if (event->recorded) {
    enqueue(stream, {.event = event, .number = event->recorded});
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  const Lock lock;
  auto made = std::make_shared<Event>();
  *event = reinterpret_cast<cudaEvent_t>(made.get());
  return events[*event] = std::move(made), cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, 0);
}
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Lock lock;
  return events.erase(event), cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t in, unsigned) {
  const Lock lock;
  const std::shared_ptr<Event> event = events.at(handle);
  Stream* stream = stream_of(in);
  event->graph = stream->graph;
  event->stream = stream;
  if (stream->graph) return cudaSuccess;
  enqueue(stream, {.event = event, .number = ++event->recorded, .records = true});
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) {
  const Lock lock;
  REFUSE_IN_CAPTURE();
  progress();
  const Event& event = *events.at(handle);
  if (event.graph) return failed(cudaErrorCapturedEvent);
  return event.done == event.recorded ? cudaSuccess : cudaErrorNotReady;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const Lock lock;
  REFUSE_IN_CAPTURE();
  ++counts["waits"];
  Event& event = *events.at(handle);
  if (event.graph) return failed(cudaErrorCapturedEvent);
  run_until(event, event.recorded);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 1, cudaSuccess;
}

// ---- graphs ----

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const Lock lock;
  if (reinterpret_cast<uintptr_t>(handle) <= 2) return failed(cudaErrorStreamCaptureUnsupported);
  Stream* stream = stream_of(handle);
  if (stream->graph) return failed(cudaErrorIllegalState);
  stream->graph = new Graph{++graphs_begun, mode, {stream}};
  return captured.insert(stream->graph), cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* made) {
  const Lock lock;
  *made = nullptr;
  Graph* graph = stream_of(handle)->graph;
  if (!graph) return failed(cudaErrorIllegalState);
  for (Stream* each : graph->streams) each->graph = nullptr;
  for (auto& [key, event] : events) {
    if (event->graph == graph) event->graph = nullptr;
  }
  captured.erase(graph);
  if (graph->broken) return failed(cudaErrorStreamCaptureInvalidated);
  if (!graph->unjoined.empty()) return failed(cudaErrorStreamCaptureUnjoined);
  return *made = reinterpret_cast<cudaGraph_t>(graph), cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Lock lock;
  const Graph* graph = stream_of(handle)->graph;
  *status = !graph          ? cudaStreamCaptureStatusNone
            : graph->broken ? cudaStreamCaptureStatusInvalidated
                            : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                            unsigned long long* id, cudaGraph_t* graph,
                                            const cudaGraphNode_t** nodes,
                                            const cudaGraphEdgeData** edges, size_t* count) {
  const Lock lock;
  Graph* own = stream_of(handle)->graph;
  cudaStreamIsCapturing(handle, status);
  if (id) *id = own ? own->id : 0;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(own);
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = reinterpret_cast<Graph*>(graph)->recorded.size(), cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph,
                                                 unsigned long long) {
  auto* work = new std::vector<Work>(reinterpret_cast<Graph*>(graph)->recorded);
  return *made = reinterpret_cast<cudaGraphExec_t>(work), cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  for (const Work& work : *reinterpret_cast<std::vector<Work>*>(graph)) {
    if (const cudaError_t error = send(stream, work); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return delete reinterpret_cast<Graph*>(graph), cudaSuccess;
}
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return delete reinterpret_cast<std::vector<Work>*>(graph), cudaSuccess;
}

// ---- torch's kernels: known by their names only ----

namespace {

std::map<const void*, const char*>& kernel_names() {
  static std::map<const void*, const char*> names;
  return names;
}

}  // namespace

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int,
                                   void*, void*, void*, void*, int*) {
  kernel_names()[function] = name;
}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT char __cudaInitModule(void**) { return 1; }
EXPORT cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
  die("a kernel of torch's, that has no stand-in: " + std::string(kernel_names()[kernel]));
}

// ---- cuBLAS: matrices by columns; its own header would need more of a toolkit ----

// In no anonymous namespace: a function that takes them would not be exported.
using Handle = cudaStream_t*;
enum Status { kSuccess = 0, kExecutionFailed = 13, kNotSupported = 15 };
enum Operation { kPlain = 0 };  // others: transposed

namespace {

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

template <class Sum, class In>
Status multiply(Handle handle, Operation of_a, Operation of_b, int m, int n, int k,
                const Sum* alpha, const In* a, int64_t lda, const In* b, int64_t ldb,
                const Sum* beta, Sum* c, int64_t ldc) {
  const auto at = [](Operation as, int64_t row, int64_t column, int64_t leading) {
    return as == kPlain ? row + column * leading : column + row * leading;
  };
  ++counts["launches"];
  const auto work = [=, scale = *alpha, kept = *beta] {
    for (int column = 0; column < n; ++column) {
      for (int row = 0; row < m; ++row) {
        Sum sum = 0;
        for (int d = 0; d < k; ++d) {
          sum += static_cast<Sum>(a[at(of_a, row, d, lda)]) *
                 static_cast<Sum>(b[at(of_b, d, column, ldb)]);
        }
        Sum& out = c[row + column * ldc];
        out = scale * sum + (kept == 0 ? 0 : kept * out);
      }
    }
  };
  return send(*handle, work) == cudaSuccess ? kSuccess : kExecutionFailed;
}

}  // namespace

EXPORT Status cublasCreate_v2(Handle* handle) { return *handle = new cudaStream_t{}, kSuccess; }
EXPORT Status cublasDestroy_v2(Handle handle) { return delete handle, kSuccess; }
EXPORT Status cublasSetStream_v2(Handle handle, cudaStream_t stream) {
  return *handle = stream, kSuccess;
}
EXPORT Status cublasSetWorkspace_v2(Handle, void*, size_t) { return kSuccess; }
EXPORT Status cublasSetPointerMode_v2(Handle, int) { return kSuccess; }
EXPORT Status cublasGetPointerMode_v2(Handle, int* mode) { return *mode = 0, kSuccess; }
EXPORT Status cublasSetMathMode(Handle, int) { return kSuccess; }
EXPORT Status cublasGetMathMode(Handle, int* mode) { return *mode = 0, kSuccess; }
EXPORT Status cublasSetSmCountTarget(Handle, int) { return kSuccess; }
EXPORT Status cublasSgemm_v2(Handle handle, Operation of_a, Operation of_b, int m, int n, int k,
                             const float* alpha, const float* a, int lda, const float* b, int ldb,
                             const float* beta, float* c, int ldc) {
  return multiply(handle, of_a, of_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
EXPORT Status cublasDgemm_v2(Handle handle, Operation of_a, Operation of_b, int m, int n, int k,
                             const double* alpha, const double* a, int lda, const double* b,
                             int ldb, const double* beta, double* c, int ldc) {
  return multiply(handle, of_a, of_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
EXPORT Status cublasGemmEx(Handle handle, Operation of_a, Operation of_b, int m, int n, int k,
                           const float* alpha, const void* a, cudaDataType of_in, int lda,
                           const void* b, cudaDataType, int ldb, const float* beta, float* c,
                           cudaDataType of_out, int ldc, int /*compute type*/, int /*algorithm*/) {
  const auto in = [&]<class In>(const In* left) {
    return multiply(handle, of_a, of_b, m, n, k, alpha, left, lda, static_cast<const In*>(b), ldb,
                    beta, c, ldc);
  };
  if (of_out != CUDA_R_32F) return kNotSupported;
  if (of_in == CUDA_R_32F) return in(static_cast<const float*>(a));
  if (of_in == CUDA_R_16BF) return in(static_cast<const BFloat16*>(a));
  return kNotSupported;
}

// ---- the driver, which torch asks whether a device is in use; for cuBLAS it must be ----

EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int* version) { return *version = kVersion, CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
  static int some;
  return *context = reinterpret_cast<CUcontext>(&some), CUDA_SUCCESS;
}
