// The kernels of one instruction set. avx2.cpp, avx512.cpp, avx512bf16.cpp and neon.cpp each
// compile this source and export a table of entry points. The including file defines LANES (floats
// per vector), ROWS (rows of a register tile), ISA (the namespace), ISA_NAME, and BF16_PRODUCTS
// where the processor multiplies bf16.
//
// Do not use function templates of the standard library here: the linker keeps one instance of
// each, possibly one compiled for instructions that this processor lacks.

namespace attention {
namespace ISA {

constexpr int BLOCK = 384;  // the largest number of keys per block
static_assert(BLOCK % ROWS == 0 && BLOCK % (2 * LANES) == 0 && BLOCK % 32 == 0,
              "a block consists of whole tiles");

// clang-format off: each header depends on those above it
#include "vectors.h"
#include "product.h"
#include "pack.h"
#include "visible.h"
#include "scores.h"
#include "forward.h"
#include "few_queries.h"
#include "backward.h"
// clang-format on
static_assert(QUERIES % ROWS == 0 && QUERIES % TABLE_ROWS == 0 && TABLE_ROWS % ROWS == 0,
              "a strip lies within one step and one row of the table");

static void forward(const Call& c, const Item& item, char* memory) {
  if (c.type == Type::f32) return forward_item<float>(c, item, memory);
  if (c.type == Type::bf16) return forward_item<bf16>(c, item, memory);
  return forward_item<f16>(c, item, memory);
}
static void few(const Call& c, const Item& item, char* memory, float* partial) {
  if (c.type == Type::f32) return few_item<float>(c, item, memory, partial);
  if (c.type == Type::bf16) return few_item<bf16>(c, item, memory, partial);
  return few_item<f16>(c, item, memory, partial);
}
static void backward(const Call& c, const Item& item, char* memory, Progress* progress) {
  if (c.type == Type::f32) return backward_item<float>(c, item, memory, progress);
  if (c.type == Type::bf16) return backward_item<bf16>(c, item, memory, progress);
  return backward_item<f16>(c, item, memory, progress);
}

extern const Kernels kernels;
const Kernels kernels = {ISA_NAME,  ROWS, QUERIES,   BLOCK,          forward_bytes, forward,
                         few_bytes, few,  few_merge, backward_bytes, backward};

}  // namespace ISA
}  // namespace attention
