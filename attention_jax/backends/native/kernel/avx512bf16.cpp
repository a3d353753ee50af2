// The kernels for AVX-512 with products of bf16.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "call.h"
#include "pool.h"

#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif

#define ISA avx512bf16
#define ISA_NAME "avx512bf16"
#define BF16_PRODUCTS
#define LANES 16
#define ROWS 12
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
