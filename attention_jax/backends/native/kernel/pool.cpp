// The caller works too, and waits only for items that have begun, so that a pool whose threads are
// all busy, or which has none, is no deadlock. Threads of the pool that come late find nothing to
// do.
#include "pool.h"

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace attention {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// Numbers below the normal range count as 0, as in XLA's own code: every thread rounds alike.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#endif
};

struct Work {
  std::atomic<int64_t> next{0}, done{0}, workers{0};
  int64_t count;
  const std::function<void(int64_t, int64_t)>* body;  // the caller's: not touched once all is done
  std::mutex mutex;
  std::condition_variable finished;

  void help() {
    const FlushDenormals flush;
    int64_t worker = -1;
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
      if (worker < 0) worker = workers.fetch_add(1);
      (*body)(i, worker);
      if (done.fetch_add(1) + 1 == count) {
        const std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }
};

void destroy(const ffi::CallFrame* frame, ffi::Error* error) {
  ffi::ErrorDestroy arguments = {sizeof(ffi::ErrorDestroy), nullptr, error};
  frame->api->error_destroy(&arguments);
}

}  // namespace

void Progress::wait(int64_t number, int64_t step, int64_t E) const {
  const auto until = [&](int64_t other) {
    for (int spins = 0; passed[other].load(std::memory_order_acquire) <= step; spins++)
      spins < 1000 ? pause() : std::this_thread::yield();
  };
  const int64_t before = number - (chained ? 1 : E);
  if (before >= 0) until(before);
}

void Progress::pass(int64_t number, int64_t step) const {
  passed[number].store(step + 1, std::memory_order_release);
}

int64_t Pool::threads() const {
  int64_t count = 1;
  ffi::ThreadPoolNumThreads arguments = {sizeof(arguments), nullptr, frame_->context, &count};
  if (ffi::Error* error = frame_->api->thread_pool_num_threads(&arguments)) {
    destroy(frame_, error);
    return 1;
  }
  return count > 1 ? count : 1;
}

void Pool::run(int64_t count, int64_t workers,
               const std::function<void(int64_t, int64_t)>& body) const {
  const auto work = std::make_shared<Work>();
  work->count = count;
  work->body = &body;
  for (int64_t i = 1; i < workers && i < count; i++) {
    auto* held = new std::shared_ptr<Work>(work);
    const auto task = [](void* data) {
      const std::unique_ptr<std::shared_ptr<Work>> mine(static_cast<std::shared_ptr<Work>*>(data));
      (*mine)->help();
    };
    ffi::ThreadPoolSchedule arguments = {sizeof(arguments), nullptr, frame_->context, task, held};
    if (ffi::Error* error = frame_->api->thread_pool_schedule(&arguments)) {
      destroy(frame_, error);
      delete held;
      break;
    }
  }
  work->help();
  for (int spins = 0; spins < 2000 && work->done.load() < count; spins++) pause();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done.load() >= count; });
}

}  // namespace attention
