// The kernels for AVX-512: 32 registers of 16 floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "call.h"
#include "pool.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif

#define ISA avx512
#define ISA_NAME "avx512"
#define LANES 16
#define ROWS 12
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
