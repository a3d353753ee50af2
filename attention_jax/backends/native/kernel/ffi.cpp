// The two handlers that XLA calls, and how their work is divided into items.
//
// The division may depend on the number of threads, but results do not: a query row (forward) or a
// key block (backward) is computed the same way whatever item it is in.
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

// The kernels of instruction set `which` (1: AVX-512, 2: AVX2, 3: NEON; 0: the best available), or
// null if this processor does not support it.
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

// The workspaces of all workers, allocated before the first item starts.
class Workspaces {
 public:
  Workspaces(int64_t workers, size_t bytes) : bytes_(bytes / 4096 * 4096 + 4096) {
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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t CHUNK = 1024;  // the smallest number of keys per item, see few_queries.h

void run_few(const Call& c, const Kernels& isa, const Pool& pool) {
  const int64_t chunks = std::max<int64_t>(1, c.S / CHUNK);
  const int64_t length = ceil_div(ceil_div(c.S, chunks), 64) * 64;
  const int64_t rows = c.E * c.G * c.T, stride = rows * (c.D + 2);
  std::vector<Item> items;
  int64_t max_heads = 1;
  for (int64_t e = 0, last; e < c.E; e = last) {
    const auto within = [&](int64_t other) {
      const int64_t away = c.k.outer[other] - c.k.outer[e];
      const bool same_keys = c.positions.raw(other, 0) == c.positions.raw(e, 0) &&
                             c.key_ids.raw(other, 0) == c.key_ids.raw(e, 0);
      return away >= 0 && away < c.k.row && same_keys;
    };
    for (last = e + 1; last < c.E && last - e < 256 && within(last);) last++;
    max_heads = std::max(max_heads, last - e);
    for (int64_t p = 0; p < chunks; p++)
      items.push_back({e, last, std::min(c.S, p * length), std::min(c.S, (p + 1) * length), p});
  }
  const std::unique_ptr<float[]> partial(new float[chunks * stride]);
  const int64_t workers = std::min<int64_t>(items.size(), pool.threads());
  Workspaces workspaces(workers, isa.few_bytes(c, max_heads));
  pool.run(items.size(), workers, [&](int64_t i, int64_t worker) {
    isa.few(c, items[i], workspaces.of(worker), partial.get() + items[i].number * stride);
  });
  for (int64_t e = 0; e < c.E; e++)
    for (int64_t r = 0; r < c.G * c.T; r++) isa.few_merge(c, e, r, partial.get(), chunks, stride);
}

// Query rows per item: enough to amortize packing the keys, few enough for the L2 cache and for an
// even load of all threads.
constexpr int64_t MAX_ROWS = 768, MIN_ROWS = 96, ITEMS_PER_THREAD = 3, ALIGNED = 48;

void run_forward(const Call& c, const Kernels& isa, const Pool& pool) {
  const int64_t threads = pool.threads();
  const int64_t wanted = ceil_div(ITEMS_PER_THREAD * threads, c.E);
  int64_t count = ceil_div(c.T, std::max<int64_t>(1, MAX_ROWS / c.G));
  count = std::max(count, std::min(wanted, ceil_div(c.T, MIN_ROWS)));
  const int64_t rows = ceil_div(ceil_div(c.T, count), ALIGNED) * ALIGNED;
  std::vector<Item> items;
  // The last rows first: under a causal mask they take longest, and a long item at the end would
  // leave threads idle.
  for (int64_t begin = (c.T - 1) / rows * rows; begin >= 0; begin -= rows)
    for (int64_t e = 0; e < c.E; e++)
      items.push_back({e, e + 1, begin, std::min(c.T, begin + rows), 0});
  const int64_t workers = std::min<int64_t>(items.size(), threads);
  Workspaces workspaces(workers, isa.forward_bytes(c, rows));
  pool.run(items.size(), workers,
           [&](int64_t i, int64_t worker) { isa.forward(c, items[i], workspaces.of(worker)); });
}

void run_backward(Call& c, const Kernels& isa, const Pool& pool) {
  const std::unique_ptr<float[]> delta(new float[c.E * c.G * c.T]);
  c.delta = delta.get();
  Progress progress = {nullptr, false};
  for (int i = 0; i < c.score_count; i++) {
    const View& gradient = c.scores[i].gradient;
    if (!gradient) continue;
    // Key blocks of a head add to the same entries of an array without columns.
    const bool rows_alone = gradient.rows > 1 && gradient.columns == 1;
    progress.across_heads |= gradient.shared || (gradient.shared_in_group && rows_alone);
    std::memset(gradient.data, 0, gradient.size * gradient.itemsize);
  }
  std::vector<Item> items;
  for (int64_t begin = 0; begin < c.S; begin += c.block_k)
    for (int64_t e = 0; e < c.E; e++)
      items.push_back({e, e + 1, begin, std::min(c.S, begin + c.block_k), int64_t(items.size())});
  std::vector<std::atomic<int64_t>> steps_done(items.size());
  for (auto& x : steps_done) x.store(0, std::memory_order_relaxed);
  progress.steps_done = steps_done.data();
  const int64_t workers = std::min<int64_t>(items.size(), pool.threads());
  Workspaces workspaces(workers, isa.backward_bytes(c));
  pool.run(items.size(), workers, [&](int64_t i, int64_t worker) {
    isa.backward(c, items[i], workspaces.of(worker), &progress);
  });
}

ffi::Error* handle(const ffi::CallFrame* frame, bool backward) {
  if (answer_metadata_query(frame) || frame->stage != ffi::EXECUTE) return nullptr;
  try {
    Options options;
    Call c = read_call(frame, backward, &options);
    const Kernels* isa = kernels(options.instructions);
    if (!isa)
      throw InvalidArgument("attention: this processor does not support the instruction set");
    c.block_k = options.block_k ? options.block_k : isa->block;
    if (c.block_k < 96 || c.block_k > isa->block || c.block_k % 96)
      throw InvalidArgument("attention: block_k must be a multiple of 96 up to 384");
    if (c.E == 0 || c.G == 0) return nullptr;
    const Pool pool(frame);
    if (backward)
      run_backward(c, *isa, pool);
    else if (c.T * c.G <= options.few_queries)
      run_few(c, *isa, pool);
    else
      run_forward(c, *isa, pool);
    return nullptr;
  } catch (const InvalidArgument& invalid) {
    return error(frame, ffi::INVALID_ARGUMENT, invalid.what());
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
// The name of instruction set `which`, see `kernels`; null if this processor does not support it.
EXPORT const char* attention_instructions(int64_t which) {
  const attention::Kernels* isa = attention::kernels(which);
  return isa ? isa->name : nullptr;
}
