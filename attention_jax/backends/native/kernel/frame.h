// From XLA's call frame to a `Call`: everything that comes from outside is checked here.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "call.h"
#include "xla_ffi.h"

namespace attention {

// What each array is. The attributes `arguments` and `results` hold a row per array: its role, then
// for each vmapped axis of the call which axis of the array that is, or -1. As in operands.py.
// clang-format off: one line per role is too many
enum class Role : int64_t {
  query, key, value, scale, sink, bounds, positions, query_ids, key_ids, kinds, bits, seed,
  threshold, keep_probability, example, head, softcap, bias, diagonal, out, m, log_l, d_out, d_lse,
  d_query, d_key, d_value, d_scale, d_sink, d_score, count
};
// clang-format on

// Which kernels run: the attribute `options`.
struct Options {
  int64_t block_k;       // keys in a block; 0: the most
  int64_t instructions;  // 0: the best that there are; else their number in `ISAS` of ffi.cpp
  int64_t few;           // at most so many rows per key head are few queries
};

// A mistake of the caller, which becomes an INVALID_ARGUMENT error.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Whether XLA only asked which version this was compiled for.
bool answers_metadata(const ffi::CallFrame* frame);

ffi::Error* error(const ffi::CallFrame* frame, ffi::Code code, const char* message);

// Raises Refused.
Call read_call(const ffi::CallFrame* frame, bool backward, Options* options);

}  // namespace attention
