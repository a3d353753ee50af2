// The kernels for 64-bit ARM: 32 registers of 4 floats. It compiles but has not been tested on a
// machine.
#if defined(__aarch64__)
#include <cmath>
#include <cstring>

#include "call.h"
#include "pool.h"

#define ISA neon
#define ISA_NAME "neon"
#define LANES 4
#define ROWS 12
#include "kernels.h"
#endif
