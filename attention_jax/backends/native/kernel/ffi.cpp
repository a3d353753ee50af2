// The two handlers that XLA calls, and how their work is cut into items.
//
// Items depend on the number of threads only where results do not: a row's forward pass and a key
// block's backward pass are the same in any item.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "call.h"
#include "frame.h"
#include "pool.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace attention {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#endif

namespace {

// The kernels of instruction set `which` (1: AVX-512, 2: AVX2, 3: NEON; 0: the best), or null if
// this processor does not have it.
const Kernels* kernels(int64_t which) {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (which == 0 || which == 1)) return &avx512::kernels;
  if (has_avx2 && (which == 0 || which == 2)) return &avx2::kernels;
#elif defined(__aarch64__)
  if (which == 0 || which == 3) return &neon::kernels;
#endif
  return nullptr;
}

// Memory of all workers, allocated before the first item begins.
class Memory {
 public:
  Memory(int64_t workers, size_t bytes) : bytes_(bytes / 4096 * 4096 + 4096) {
    memory_.reset(static_cast<char*>(std::aligned_alloc(4096, bytes_ * workers)));
    if (!memory_) throw std::bad_alloc();
  }
  char* of(int64_t worker) { return memory_.get() + bytes_ * worker; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  size_t bytes_;
  std::unique_ptr<char, Free> memory_;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Few queries: items are parts of the keys of heads that interleave in memory.
constexpr int64_t PART = 1024;

void run_few(const Call& c, const Kernels& isa, const Pool& pool) {
  const int64_t parts = std::max<int64_t>(1, c.S / PART);
  const int64_t length = divide_up(divide_up(c.S, parts), 64) * 64;
  const int64_t rows = c.E * c.G * c.T, distance = rows * (c.D + 2);
  std::vector<Item> items;
  int64_t most = 1;
  for (int64_t e = 0, last; e < c.E; e = last) {
    const auto within = [&](int64_t other) {
      const int64_t away = c.k.outer[other] - c.k.outer[e];
      return away >= 0 && away < c.k.row;
    };
    for (last = e + 1; last < c.E && last - e < 256 && within(last);) last++;
    most = std::max(most, last - e);
    for (int64_t p = 0; p < parts; p++)
      items.push_back({e, last, std::min(c.S, p * length), std::min(c.S, (p + 1) * length), p});
  }
  const std::unique_ptr<float[]> partial(new float[parts * distance]);
  const int64_t workers = std::min<int64_t>(items.size(), pool.threads());
  Memory memory(workers, isa.few_bytes(c, most));
  pool.run(items.size(), workers, [&](int64_t i, int64_t worker) {
    isa.few(c, items[i], memory.of(worker), partial.get() + items[i].number * distance);
  });
  for (int64_t e = 0; e < c.E; e++)
    for (int64_t r = 0; r < c.G * c.T; r++) isa.few_join(c, e, r, partial.get(), parts, distance);
}

// Rows of an item: enough to pay for packing keys, few enough for the cache and for all threads.
constexpr int64_t MOST_ROWS = 768, LEAST_ROWS = 96, ITEMS_PER_THREAD = 3, ALIGNED = 48;

void run_forward(const Call& c, const Kernels& isa, const Pool& pool) {
  const int64_t threads = pool.threads();
  const int64_t wanted = divide_up(ITEMS_PER_THREAD * threads, c.E);
  int64_t count = divide_up(c.T, std::max<int64_t>(1, MOST_ROWS / c.G));
  count = std::max(count, std::min(wanted, divide_up(c.T, LEAST_ROWS)));
  const int64_t rows = divide_up(divide_up(c.T, count), ALIGNED) * ALIGNED;
  std::vector<Item> items;
  for (int64_t begin = (c.T - 1) / rows * rows; begin >= 0;
       begin -= rows)  // causal: long rows first
    for (int64_t e = 0; e < c.E; e++)
      items.push_back({e, e + 1, begin, std::min(c.T, begin + rows), 0});
  const int64_t workers = std::min<int64_t>(items.size(), threads);
  Memory memory(workers, isa.forward_bytes(c, rows));
  pool.run(items.size(), workers,
           [&](int64_t i, int64_t worker) { isa.forward(c, items[i], memory.of(worker)); });
}

void run_backward(Call& c, const Kernels& isa, const Pool& pool) {
  const std::unique_ptr<float[]> delta(new float[c.E * c.G * c.T]);
  c.delta = delta.get();
  Progress progress = {nullptr, false};
  for (int i = 0; i < c.score_count; i++) {
    const View& gradient = c.scores[i].gradient;
    if (!gradient) continue;
    progress.chained |= gradient.shared;
    std::memset(gradient.data, 0, gradient.size * gradient.itemsize);
  }
  std::vector<Item> items;
  for (int64_t begin = 0; begin < c.S; begin += c.block_k)
    for (int64_t e = 0; e < c.E; e++)
      items.push_back({e, e + 1, begin, std::min(c.S, begin + c.block_k), int64_t(items.size())});
  std::vector<std::atomic<int64_t>> passed(items.size());
  for (auto& x : passed) x.store(0, std::memory_order_relaxed);
  progress.passed = passed.data();
  const int64_t workers = std::min<int64_t>(items.size(), pool.threads());
  Memory memory(workers, isa.backward_bytes(c));
  pool.run(items.size(), workers, [&](int64_t i, int64_t worker) {
    isa.backward(c, items[i], memory.of(worker), &progress);
  });
}

ffi::Error* handle(const ffi::CallFrame* frame, bool backward) {
  if (answers_metadata(frame) || frame->stage != ffi::EXECUTE) return nullptr;
  try {
    Options options;
    Call c = read_call(frame, backward, &options);
    const Kernels* isa = kernels(options.instructions);
    if (!isa) throw Refused("attention: this processor does not have these instructions");
    c.block_k = options.block_k ? options.block_k : isa->block;
    if (c.block_k < 96 || c.block_k > isa->block || c.block_k % 96)
      throw Refused("attention: block_k must be a multiple of 96, and at most 384");
    if (c.E == 0 || c.G == 0) return nullptr;
    const Pool pool(frame);
    if (backward)
      run_backward(c, *isa, pool);
    else if (c.T * c.G <= options.few)
      run_few(c, *isa, pool);
    else
      run_forward(c, *isa, pool);
    return nullptr;
  } catch (const Refused& refused) {
    return error(frame, ffi::INVALID_ARGUMENT, refused.what());
  } catch (const std::bad_alloc&) {
    return error(frame, ffi::RESOURCE_EXHAUSTED, "attention: out of memory");
  } catch (const std::exception& other) {
    return error(frame, ffi::INTERNAL, other.what());
  }
}

}  // namespace
}  // namespace attention

EXPORT ffi::Error* attention_forward(const ffi::CallFrame* frame) {
  return attention::handle(frame, false);
}
EXPORT ffi::Error* attention_backward(const ffi::CallFrame* frame) {
  return attention::handle(frame, true);
}
// The name of the instruction set that calls use, or null if this processor has none of them.
EXPORT const char* attention_instructions(int64_t which) {
  const attention::Kernels* isa = attention::kernels(which);
  return isa ? isa->name : nullptr;
}
