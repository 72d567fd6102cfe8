// Part of runtime.cpp: work in streams, the events that order it, and what captures make of it.
#pragma once
#include <cuda_runtime_api.h>

#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "arena.h"

namespace {

using Work = std::function<void()>;

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
