// The calling thread processes items too, and waits only for items that have started. So there is
// no deadlock even if all threads of the pool are busy, or there are none. A task that the pool
// runs only after all items are done returns at once.
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

// Flushes denormals to zero, as XLA's own code does, so that all threads round alike.
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
  const std::function<void(int64_t, int64_t)>* body;  // valid until all items are done
  std::mutex mutex;
  std::condition_variable finished;

  void process_items() {
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

void Progress::wait_for_previous(int64_t number, int64_t step, int64_t E) const {
  const int64_t previous = number - (across_heads ? 1 : E);
  if (previous < 0) return;
  for (int spins = 0; steps_done[previous].load(std::memory_order_acquire) <= step; spins++)
    spins < 1000 ? pause() : std::this_thread::yield();
}

void Progress::mark_done(int64_t number, int64_t step) const {
  steps_done[number].store(step + 1, std::memory_order_release);
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
      (*mine)->process_items();
    };
    ffi::ThreadPoolSchedule arguments = {sizeof(arguments), nullptr, frame_->context, task, held};
    if (ffi::Error* error = frame_->api->thread_pool_schedule(&arguments)) {
      destroy(frame_, error);
      delete held;
      break;
    }
  }
  work->process_items();
  for (int spins = 0; spins < 2000 && work->done.load() < count; spins++) pause();
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done.load() >= count; });
}

}  // namespace attention
