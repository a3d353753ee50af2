// One call: its sizes and arrays, checked. What all instruction sets share; `frame.cpp` fills it
// in.
//
// A head is a pair (e, g): `e` counts the pairs of example and key-value head, `g` the query heads
// that share their keys. Arrays stay where XLA has them: each has an offset for every e and g, 0
// along the axes that it lacks, and the distance of its rows. Nothing is copied for vmapped axes.
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
  int64_t itemsize = 0, row = 0, size = 0;  // `row`: from one row to the next, in elements
  int64_t rows = 0, columns = 0;            // without the mapped axes; 1 for those it lacks
  std::vector<int64_t> outer, group;        // offsets in elements, by e and by g
  bool shared = false;                      // some e use the same entries

  explicit operator bool() const { return data != nullptr; }
  template <class X>
  X* at(int64_t e, int64_t g) const {
    return data ? static_cast<X*>(static_cast<void*>(data + itemsize * (outer[e] + group[g])))
                : nullptr;
  }
  const void* raw(int64_t e, int64_t g) const { return at<void>(e, g); }
};

// Scores, in the order in which they change a logit.
enum class ScoreKind { softcap, bias, diagonal };
struct Score {
  ScoreKind kind;
  View array, gradient;  // softcap: the cap; bias: [T or 1, S or 1]; diagonal: [T + S - 1] by j - i
};
constexpr int MOST_SCORES = 8;

// The same for one head.
struct HeadScore {
  ScoreKind kind;
  const float* array;
  float *gradient, *entries;  // entries: those of a key block that its steps share, or null
  int64_t row, gradient_row,
      column;  // from one row to the next, and one column: 0 if it broadcasts
};

struct Head {
  const void *q, *k, *v;
  float *out, *m, *log_l;
  const float *dout, *dlse;
  float *dq, *dk, *dv, *dscale, *dsink;
  float scale, sink;
  const int32_t *bounds, *positions, *query_ids, *key_ids, *kinds;
  const uint32_t* bits;
  uint32_t dropout_hash, threshold;  // the hash of seed, example and head; keep what is below
  float kept;                        // what a kept probability is multiplied by; 0: no dropout
};

struct Call {
  Type type = Type::f32;
  int64_t E = 1, G = 1, T = 0, S = 0, H = 0, D = 0;
  int64_t block_k = 0, units = 0;  // keys in a block; units of 32 keys in all
  View q, k, v, out, m, log_l, dout, dlse, dq, dk, dv, dscale, dsink, scale, sink;
  View bounds, positions, query_ids, key_ids, kinds, bits;
  View seed, threshold, keep_probability, example, number;
  float* delta = nullptr;  // [E G T], of the backward pass: see backward.h
  Score scores[MOST_SCORES];
  int score_count = 0, softcap_count = 0;

  Head head(int64_t e, int64_t g) const;
  HeadScore score(int which, int64_t e, int64_t g) const;
};

// The murmur3 finalizer, and what spreads the four indices: as core/dropout.py.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}
constexpr uint32_t SPREAD_B = 0x9E3779B1u, SPREAD_N = 0x85EBCA77u, SPREAD_Q = 0xC2B2AE3Du,
                   SPREAD_K = 0x27D4EB2Fu;

// Working memory of one worker, handed out front to back. Without memory it only counts, so that
// the bytes to allocate and the way they are used come from the same lines.
class Arena {
 public:
  explicit Arena(char* memory = nullptr) : memory_(memory) {}
  float* floats(int64_t count) {
    float* p = memory_ ? reinterpret_cast<float*>(memory_ + used_) : nullptr;
    used_ += (count * 4 + 127) / 64 * 64;  // a spare cache line, so that arrays do not align
    return p;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

// What one worker does at a time. Forward: query rows [begin, end) of heads (e, all g). Few
// queries: keys [begin, end) of heads [e, last). Backward: the key block that begins at `begin`.
struct Item {
  int64_t e, last, begin, end, number;
};

struct Progress;  // how many steps each item of the backward pass has passed: see pool.h

struct Kernels {
  const char* name;
  int rows;         // of a register tile
  int query_block;  // of the backward pass
  int block;        // keys in a block, at most
  size_t (*forward_bytes)(const Call&, int64_t rows);
  void (*forward)(const Call&, const Item&, char* memory);
  size_t (*few_bytes)(const Call&, int64_t heads);
  void (*few)(const Call&, const Item&, char* memory, float* partial);
  void (*few_join)(const Call&, int64_t e, int64_t row, float* partial, int64_t parts,
                   int64_t distance);
  size_t (*backward_bytes)(const Call&);
  void (*backward)(const Call&, const Item&, char* memory, Progress*);
};

// What a part of the keys contributes to one row: maximum, sum and weighted values.
inline int64_t partial_row(const Call& c) { return c.D + 2; }

}  // namespace attention
