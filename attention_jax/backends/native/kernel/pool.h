// Runs items on XLA's thread pool, and orders the steps of items that add to the same memory.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

#include "xla_ffi.h"

namespace attention {

// The number of steps that each item of the backward pass has done, see backward.h. Item `number`
// is key block number / E of key-value head number % E. It waits for the previous block of its
// head, or, if `across_heads`, for the previous item.
struct Progress {
  std::atomic<int64_t>* steps_done;
  bool across_heads;

  // Waits until the previous item has done this step.
  void wait_for_previous(int64_t number, int64_t step, int64_t E) const;
  void mark_done(int64_t number, int64_t step) const;
};

class Pool {
 public:
  explicit Pool(const ffi::CallFrame* frame) : frame_(frame) {}
  // The threads of XLA's pool, at least 1.
  int64_t threads() const;
  // Calls body(item, worker) for items 0 .. count - 1, started in this order, on at most `workers`
  // threads, one of which is the calling thread.
  void run(int64_t count, int64_t workers, const std::function<void(int64_t, int64_t)>& body) const;

 private:
  const ffi::CallFrame* frame_;
};

}  // namespace attention
