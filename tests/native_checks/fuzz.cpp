// Calls the handlers as XLA does, with random arrays, axes and tables, a third of them wrong. Every
// array is a heap block of its own, so that under AddressSanitizer any access outside of one ends
// the program; under ThreadSanitizer two threads at the same entry do. Built and run by
// test_native_sanitized.py: fuzz SECONDS [SEED].
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "frame.h"

extern "C" ffi::Error* attention_forward(const ffi::CallFrame*);
extern "C" ffi::Error* attention_backward(const ffi::CallFrame*);
extern "C" const char* attention_instructions(int64_t);
struct ffi::Error {
  std::string message;
};

namespace {

using attention::Role;
std::mt19937_64 generator;
int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(generator); }
bool chance(double p) { return std::uniform_real_distribution<>(0, 1)(generator) < p; }

std::vector<std::thread> helpers;
int64_t threads = 1;

struct Fuzzed {  // one array
  Role role;
  int64_t score = -1;
  ffi::DataType dtype = ffi::F32;
  std::vector<int64_t> dims, axes;  // axes: of each level, or -1
  std::unique_ptr<char[]> data;
  ffi::Buffer buffer;

  void allocate(int64_t S, int64_t bits) {
    int64_t count = 1;
    for (const int64_t n : dims) count *= n;
    const bool narrow = dtype == ffi::F16 || dtype == ffi::BF16;
    data.reset(new char[count * (narrow ? 2 : 4)]);
    for (int64_t i = 0; i < count; i++) {
      const double x = std::normal_distribution<>()(generator);
      if (narrow) {
        reinterpret_cast<uint16_t*>(data.get())[i] = below(65536);
      } else if (dtype == ffi::F32) {
        reinterpret_cast<float*>(data.get())[i] = chance(0.01)
                                                      ? std::numeric_limits<float>::quiet_NaN()
                                                  : chance(0.01) ? -INFINITY
                                                                 : x;
      } else if (role == Role::kinds) {
        reinterpret_cast<int32_t*>(data.get())[i] = chance(0.3)            ? 0
                                                    : chance(0.3) || !bits ? 1
                                                                           : 2 + below(bits);
      } else {
        const int64_t wild = chance(0.01) ? below(1ll << 32) : below(S + 20) - 10;
        reinterpret_cast<uint32_t*>(data.get())[i] = uint32_t(wild);
      }
    }
    buffer = {sizeof(ffi::Buffer), nullptr, dtype, data.get(), int64_t(dims.size()), dims.data()};
  }
};

struct Generated {
  std::vector<int64_t> levels;
  std::vector<Fuzzed> arguments, results;

  // An array of this core shape, with each mapped axis of `which` at a random place before the
  // last.
  Fuzzed array(Role role, ffi::DataType dtype, std::vector<int64_t> core, std::vector<bool> which) {
    Fuzzed x;
    x.role = role;
    x.dtype = dtype;
    x.dims = core;
    x.axes.assign(levels.size(), -1);
    for (size_t l = 0; l < levels.size(); l++) {
      if (!which[l]) continue;
      const int64_t place = core.empty() ? below(x.dims.size() + 1) : below(x.dims.size());
      for (int64_t& axis : x.axes) axis += axis >= place;
      x.dims.insert(x.dims.begin() + place, levels[l]);
      x.axes[l] = place;
    }
    return x;
  }
};

std::vector<bool> some(size_t n, double p) {
  std::vector<bool> which(n);
  for (size_t i = 0; i < n; i++) which[i] = chance(p);
  return which;
}

Generated generate(bool backward) {
  Generated g;
  for (int64_t l = below(4); l > 0; l--) g.levels.push_back(1 + below(3));
  const size_t L = g.levels.size();
  const int64_t T = 1 + below(chance(0.3) ? 20 : chance(0.2) ? 500 : 150);
  const int64_t S = 1 + below(chance(0.1) ? 2500 : 500);
  const int64_t H = 1 + below(40), D = 1 + below(40);
  const std::vector<bool> all(L, true), none(L, false), keys = some(L, 0.6), values = some(L, 0.6);
  std::vector<bool> outer(L);
  for (size_t l = 0; l < L; l++) outer[l] = keys[l] || values[l];
  const ffi::DataType type = chance(0.5) ? ffi::F32 : chance(0.5) ? ffi::BF16 : ffi::F16;
  const auto in = [&](Role role, ffi::DataType dtype, std::vector<int64_t> core, double p = 0.5) {
    g.arguments.push_back(g.array(role, dtype, core, some(L, p)));
  };
  g.arguments.push_back(g.array(Role::query, type, {T, H}, some(L, 0.8)));
  g.arguments.push_back(g.array(Role::key, type, {S, H}, keys));
  g.arguments.push_back(g.array(Role::value, type, {S, D}, values));
  in(Role::scale, ffi::F32, {}, 0.1);
  if (chance(0.3)) in(Role::sink, ffi::F32, {});
  if (chance(0.5)) in(Role::bounds, ffi::S32, {T, 2});
  if (chance(0.2)) in(Role::positions, ffi::S32, {S});
  if (chance(0.2)) in(Role::query_ids, ffi::S32, {T}), in(Role::key_ids, ffi::S32, {S});
  if (chance(0.3)) {
    in(Role::kinds, ffi::S32, {(T + 47) / 48, (S + 31) / 32});
    if (chance(0.9)) in(Role::bits, ffi::U32, {48 * (1 + below(9)), 1 + below(2)}, 0.2);
  }
  if (chance(0.2))
    for (const Role role :
         {Role::seed, Role::threshold, Role::keep_probability, Role::example, Role::head})
      in(role,
         role == Role::keep_probability ? ffi::F32
         : role <= Role::threshold      ? ffi::U32
                                        : ffi::S32,
         {});
  int64_t scores = 0;
  for (; chance(0.4) && scores < 3; scores++) {
    const int64_t kind = below(3);
    if (kind == 0) in(Role::softcap, ffi::F32, {}, 0.1);
    if (kind == 1)
      in(Role::bias, ffi::F32, {chance(0.5) ? T : 1, chance(0.5) ? S : 1}, chance(0.3) ? 0.1 : 0.5);
    if (kind == 2) in(Role::diagonal, ffi::F32, {T + S - 1});
    if (backward && kind > 0 && chance(0.7)) {
      const Fuzzed& like = g.arguments.back();
      Fuzzed x;
      x.role = Role::d_score, x.score = scores, x.dims = like.dims, x.axes = like.axes;
      g.results.push_back(std::move(x));
    }
  }
  auto& place = backward ? g.arguments : g.results;
  place.push_back(g.array(Role::out, ffi::F32, {T, D}, all));
  place.push_back(g.array(Role::m, ffi::F32, {T}, all));
  place.push_back(g.array(Role::log_l, ffi::F32, {T}, all));
  if (backward) {
    g.arguments.push_back(g.array(Role::d_out, ffi::F32, {T, D}, all));
    g.arguments.push_back(g.array(Role::d_lse, ffi::F32, {T}, all));
    g.results.push_back(g.array(Role::d_query, ffi::F32, {T, H}, all));
    g.results.push_back(g.array(Role::d_key, ffi::F32, {S, H}, outer));
    g.results.push_back(g.array(Role::d_value, ffi::F32, {S, D}, outer));
    if (chance(0.5)) g.results.push_back(g.array(Role::d_scale, ffi::F32, {}, all));
  }
  return g;
}

// Something of the call that is not as it should be.
void spoil(Generated& g) {
  auto& list = chance(0.5) ? g.arguments : g.results;
  Fuzzed& x = list[below(list.size())];
  switch (below(6)) {
    case 0: x.role = Role(below(int64_t(Role::count) + 2) - 1); break;
    case 1:
      if (!x.axes.empty()) x.axes[below(x.axes.size())] = below(6) - 2;
      break;
    case 2:
      if (!x.dims.empty()) x.dims[below(x.dims.size())] = below(60);
      break;
    case 3: x.dtype = chance(0.5) ? ffi::F32 : ffi::S32; break;
    case 4:
      if (!x.dims.empty()) x.dims.pop_back();
      break;
    case 5: list.erase(list.begin() + below(list.size())); break;
  }
}

ffi::Error* create(ffi::ErrorCreate* a) { return new ffi::Error{a->message}; }
void destroy(ffi::ErrorDestroy* a) { delete a->error; }
ffi::Error* schedule(ffi::ThreadPoolSchedule* a) {
  if (chance(0.1)) return new ffi::Error{"no thread"};
  helpers.emplace_back(a->task, a->data);
  return nullptr;
}
ffi::Error* num_threads(ffi::ThreadPoolNumThreads* a) {
  *a->count = threads;
  return nullptr;
}

// Whether the call was accepted.
bool call(Generated& g, bool backward, bool wrong) {
  int64_t bits = 0;
  for (const Fuzzed& x : g.arguments)
    if (x.role == Role::bits) bits = (x.dims.size() > 1 ? 48 : 1);
  std::vector<int64_t> rows[2], sizes = {int64_t(g.levels.size())};
  sizes.insert(sizes.end(), g.levels.begin(), g.levels.end());
  std::vector<void*> buffers[2];
  std::vector<int> types[2];
  int64_t S = 1;
  for (const Fuzzed& x : g.arguments)
    if (x.role == Role::key)
      for (const int64_t n : x.dims) S = std::max(S, n);
  for (const int side : {0, 1})
    for (Fuzzed& x : side ? g.results : g.arguments) {
      x.allocate(S, wrong ? 500 : bits / 48);
      rows[side].insert(rows[side].end(), {int64_t(x.role), x.score});
      rows[side].insert(rows[side].end(), x.axes.begin(), x.axes.end());
      buffers[side].push_back(&x.buffer);
      types[side].push_back(ffi::BUFFER);
    }
  std::vector<int64_t> options = {chance(0.5) ? 96 : 0, below(4), below(17)};
  if (!attention_instructions(options[1])) options[1] = 0;  // the best that there is
  if (wrong && chance(0.3)) options[below(3)] = below(1000) - 500;
  if (wrong && chance(0.2)) sizes[below(sizes.size())] = below(7) - 2;
  const auto array = [](std::vector<int64_t>& x) {
    return ffi::Array{ffi::S64, x.size(), x.data()};
  };
  ffi::Array values[4] = {array(rows[0]), array(sizes), array(options), array(rows[1])};
  const char* names[4] = {"arguments", "levels", "options", "results"};
  ffi::Span spans[4];
  ffi::Span* span_pointers[4];
  void* value_pointers[4];
  int value_types[4];
  for (int i = 0; i < 4; i++) {
    spans[i] = {names[i], strlen(names[i])};
    span_pointers[i] = &spans[i], value_pointers[i] = &values[i];
    value_types[i] = ffi::ARRAY_ATTRIBUTE;
  }
  ffi::Api api = {};
  api.error_create = create, api.error_destroy = destroy;
  api.thread_pool_schedule = schedule, api.thread_pool_num_threads = num_threads;
  threads = 1 + below(4);
  const auto side = [&](int i) {
    return ffi::Buffers{sizeof(ffi::Buffers), nullptr, int64_t(buffers[i].size()), types[i].data(),
                        buffers[i].data()};
  };
  const ffi::CallFrame frame = {
      sizeof(ffi::CallFrame),
      nullptr,
      &api,
      nullptr,
      ffi::EXECUTE,
      side(0),
      side(1),
      {sizeof(ffi::Attributes), nullptr, 4, value_types, span_pointers, value_pointers}};
  const std::unique_ptr<ffi::Error> error(backward ? attention_backward(&frame)
                                                   : attention_forward(&frame));
  for (std::thread& helper : helpers) helper.join();
  helpers.clear();
  if (error && !wrong) {
    fprintf(stderr, "refused: %s\n", error->message.c_str());
    exit(2);
  }
  return !error;
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? atof(argv[1]) : 10;
  generator.seed(argc > 2 ? atoi(argv[2]) : 0);
  const auto start = std::chrono::steady_clock::now();
  int64_t calls = 0, accepted = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() <
         seconds) {
    const bool backward = chance(0.5), wrong = chance(0.35);
    Generated g = generate(backward);
    if (wrong) spoil(g);
    calls++;
    accepted += call(g, backward, wrong);
  }
  printf("%lld calls, %lld accepted\n", (long long)calls, (long long)accepted);
  return accepted * 3 > calls ? 0 : 1;
}
