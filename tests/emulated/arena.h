// Part of runtime.cpp: the devices' memory, and the lock of all that is emulated.
#pragma once
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

namespace {

constexpr int kDevices = 2;

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

}  // namespace
