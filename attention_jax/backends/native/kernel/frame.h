// Converts XLA's call frame to a `Call`, and checks everything that the caller passes.
#pragma once
#include <stdexcept>
#include <string>
#include <vector>

#include "call.h"
#include "xla_ffi.h"

namespace attention {

// The role of an array, as in operands.py. The attributes `arguments` and `results` hold one row
// per array: its role, its score (for d_score, else -1), and for each vmapped axis of the call the
// axis of the array, or -1.
// clang-format off: one line per role is too many
enum class Role : int64_t {
  query, key, value, scale, sink, bounds, positions, query_ids, key_ids, kinds, bits, seed,
  threshold, keep_probability, example, head, softcap, bias, diagonal, out, m, log_l, d_out, d_lse,
  d_query, d_key, d_value, d_scale, d_sink, d_score, count
};
// clang-format on

// The attribute `options`.
struct Options {
  int64_t block_k;       // keys per block; 0: the largest
  int64_t instructions;  // see `kernels` in ffi.cpp; 0: the best available
  int64_t few_queries;   // up to this many query rows, run few_queries.h
};

// A wrong call, reported to XLA as INVALID_ARGUMENT.
struct InvalidArgument : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Answers if XLA only asks for the version of the interface; returns whether it did.
bool answer_metadata_query(const ffi::CallFrame* frame);

ffi::Error* error(const ffi::CallFrame* frame, ffi::Code code, const char* message);

// Throws InvalidArgument.
Call read_call(const ffi::CallFrame* frame, bool backward, Options* options);

}  // namespace attention
