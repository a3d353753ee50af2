// The sizes and arrays of one call. `frame.cpp` reads and checks them; the kernels of all
// instruction sets use them.
//
// A query head is a pair (e, g): `e` numbers the pairs of example and key-value head, `g` the query
// heads that share this key-value head. Arrays are read and written in XLA's buffers: each has an
// offset for every e and g (0 along the axes that it lacks) and a stride between rows, so vmapped
// axes need no copies.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace attention {

enum class Type { f32, bf16, f16 };  // of query, key and value; everything else is float32
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct View {
  char* data = nullptr;                     // null: the call has no such array
  int64_t itemsize = 0, row = 0, size = 0;  // `row`: the stride between rows, in elements
  int64_t rows = 0, columns = 0;            // of one head; 1 for an axis that it lacks
  std::vector<int64_t> outer, group;        // offsets in elements, indexed by e and by g
  bool shared = false;                      // several e have the same offset
  bool shared_in_group = false;             // several g have the same offset

  explicit operator bool() const { return data != nullptr; }
  template <class X>
  X* at(int64_t e, int64_t g) const {
    return data ? static_cast<X*>(static_cast<void*>(data + itemsize * (outer[e] + group[g])))
                : nullptr;
  }
  const void* raw(int64_t e, int64_t g) const { return at<void>(e, g); }
};

// A score. The scores of a call are applied in their order.
enum class ScoreKind { softcap, bias, diagonal };
struct Score {
  ScoreKind kind;
  View array, gradient;  // softcap: the cap; bias: [T or 1, S or 1]; diagonal: [T + S - 1] by j - i
};
constexpr int MAX_SCORES = 8;

// A score for one head.
struct HeadScore {
  ScoreKind kind;
  const float* array;
  float *gradient, *shared_gradient;  // shared_gradient: sums of one item, see backward.h; or null
  int64_t row, gradient_row, column;  // strides of rows and columns, 0 if they broadcast
};

struct Head {
  const void *q, *k, *v;
  float *out, *m, *log_l;
  const float *dout, *dlse;
  float *dq, *dk, *dv, *dscale, *dsink;
  float scale, sink;
  const int32_t *bounds, *positions, *query_ids, *key_ids, *kinds;
  const uint32_t* bits;
  uint32_t dropout_hash, threshold;  // the hash of seed, example and head; keep if below threshold
  float dropout_scale;               // 1 / keep probability; 0: no dropout
};

struct Call {
  Type type = Type::f32;
  int64_t E = 1, G = 1, T = 0, S = 0, H = 0, D = 0;
  int64_t block_k = 0, units = 0;  // keys per block; number of units of 32 keys
  View q, k, v, out, m, log_l, dout, dlse, dq, dk, dv, dscale, dsink, scale, sink;
  View bounds, positions, query_ids, key_ids, kinds, bits;
  View seed, threshold, keep_probability, example, head_number;
  float* delta = nullptr;  // [E G T], see backward.h
  Score scores[MAX_SCORES];
  int score_count = 0, softcap_count = 0;

  Head head(int64_t e, int64_t g) const;
  HeadScore score(int which, int64_t e, int64_t g) const;
};

// The murmur3 finalizer and a multiplier for each of the four indices, as in core/dropout.py.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}
constexpr uint32_t SPREAD_B = 0x9E3779B1u, SPREAD_N = 0x85EBCA77u, SPREAD_Q = 0xC2B2AE3Du,
                   SPREAD_K = 0x27D4EB2Fu;

// Hands out the workspace of one worker front to back. Constructed without memory it only counts,
// so that the same code determines the size of the workspace and its layout.
class Arena {
 public:
  explicit Arena(char* memory = nullptr) : memory_(memory) {}
  float* floats(int64_t count) {
    float* p = memory_ ? reinterpret_cast<float*>(memory_ + used_) : nullptr;
    used_ += (count * 4 + 127) / 64 * 64;  // a spare cache line keeps arrays out of the same sets
    return p;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

// The unit of work of one worker. Forward: query rows [begin, end) of key-value head e and all its
// query heads. Few queries: keys [begin, end) of key-value heads [e, last). Backward: the key block
// [begin, end) of key-value head e.
struct Item {
  int64_t e, last, begin, end, number;
};

struct Progress;  // see pool.h

struct Kernels {
  const char* name;
  int rows;         // rows of a register tile
  int query_block;  // query rows per step of the backward pass
  int block;        // the largest number of keys per block
  size_t (*forward_bytes)(const Call&, int64_t rows);
  void (*forward)(const Call&, const Item&, char* memory);
  size_t (*few_bytes)(const Call&, int64_t heads);
  void (*few)(const Call&, const Item&, char* memory, float* partial);
  void (*few_merge)(const Call&, int64_t e, int64_t row, float* partial, int64_t chunks,
                    int64_t stride);
  size_t (*backward_bytes)(const Call&);
  void (*backward)(const Call&, const Item&, char* memory, Progress*);
};

// Floats of a partial result, of one row and a chunk of the keys: maximum, sum and weighted values.
inline int64_t partial_size(const Call& c) { return c.D + 2; }

}  // namespace attention
