// The kernels of one instruction set. The including file defines LANES, the floats of a vector,
// ROWS, the rows of a register tile, ISA, the namespace, and ISA_NAME; each file compiles the same
// source for one instruction set and exports a table of its entry points.
//
// No function template of the standard library may be used here: the linker keeps one copy of each,
// which might be one that this processor cannot run.

namespace attention {
namespace ISA {

constexpr int BLOCK = 384;  // keys in a block, at most
static_assert(BLOCK % ROWS == 0 && BLOCK % (2 * LANES) == 0 && BLOCK % 32 == 0, "whole tiles");

// clang-format off: each needs those before it
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
              "strips lie within steps and within rows of the table");

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
const Kernels kernels = {ISA_NAME,  ROWS, QUERIES,  BLOCK,          forward_bytes, forward,
                         few_bytes, few,  few_join, backward_bytes, backward};

}  // namespace ISA
}  // namespace attention
