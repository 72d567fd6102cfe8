// What the sanitizers must be told about fibers; nothing at all in a build without them.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

// Inlined everywhere: the thread sanitizer counts the calls of each fiber, and a call of one of
// these would begin on one fiber and end on another.
#define SIMT_INLINE inline __attribute__((always_inline))

namespace simt {

// Accesses made in its scope are the shim's own: no race between CUDA threads.
class [[maybe_unused]] Unwatched {
 public:
  Unwatched(const Unwatched&) = delete;
#if defined(__SANITIZE_THREAD__)
  SIMT_INLINE Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  SIMT_INLINE ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  SIMT_INLINE Unwatched() {}
  SIMT_INLINE ~Unwatched() {}
#endif
};

// What went before a release of `object` happened before whatever follows its acquire. Nothing else
// orders two CUDA threads: a missing barrier is a data race.
SIMT_INLINE void release([[maybe_unused]] void* object) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(object);
#endif
}
SIMT_INLINE void acquire([[maybe_unused]] void* object) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(object);
#endif
}

// One stack, as the address sanitizer and the thread sanitizer know it.
class StackIdentity {
 public:
  // Of the stack that the program itself runs on; its bounds are learnt at the first switch.
  StackIdentity() = default;
  StackIdentity(void* bottom, size_t bytes) : bottom_(bottom), bytes_(bytes) {
#if defined(__SANITIZE_THREAD__)
    thread_ = __tsan_create_fiber(0);
    created_ = true;
#endif
  }
  ~StackIdentity() {
#if defined(__SANITIZE_THREAD__)
    if (created_) __tsan_destroy_fiber(thread_);
#endif
  }
  StackIdentity(const StackIdentity&) = delete;

  // Right before the switch from this stack to `to`. `forever`: this stack is never switched to
  // again.
  SIMT_INLINE void leave([[maybe_unused]] StackIdentity& to, [[maybe_unused]] bool forever) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(forever ? nullptr : &fake_stack_, to.bottom_, to.bytes_);
#endif
#if defined(__SANITIZE_THREAD__)
    if (!created_) thread_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to.thread_, __tsan_switch_to_fiber_no_sync);
#endif
  }
  // Right after a switch to this stack from `from`.
  SIMT_INLINE void enter([[maybe_unused]] StackIdentity& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &from.bottom_, &from.bytes_);
#endif
  }

 private:
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
  void* thread_ = nullptr;
  bool created_ = false;
};

}  // namespace simt
