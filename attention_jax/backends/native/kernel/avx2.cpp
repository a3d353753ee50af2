// The kernels for AVX2 and FMA: 16 registers of 8 floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "call.h"
#include "pool.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define ISA avx2
#define ISA_NAME "avx2"
#define LANES 8
#define ROWS 6
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
