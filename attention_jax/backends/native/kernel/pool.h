// Work over XLA's own threads, and items that wait for one another.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

#include "xla_ffi.h"

namespace attention {

// How many steps each item of the backward pass has passed: see backward.h. Item `number` is of key
// block number / E and head number % E. Key blocks of a head take turns; if `chained`, all items
// do.
struct Progress {
  std::atomic<int64_t>* passed;
  bool chained;

  void wait(int64_t number, int64_t step, int64_t E) const;
  void pass(int64_t number, int64_t step) const;
};

class Pool {
 public:
  explicit Pool(const ffi::CallFrame* frame) : frame_(frame) {}
  // Of XLA's pool, and at least 1.
  int64_t threads() const;
  // body(item, worker) for items 0 .. count - 1, begun in this order, by at most `workers` threads,
  // of which the caller is one.
  void run(int64_t count, int64_t workers, const std::function<void(int64_t, int64_t)>& body) const;

 private:
  const ffi::CallFrame* frame_;
};

}  // namespace attention
