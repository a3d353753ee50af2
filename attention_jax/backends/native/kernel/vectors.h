// Vectors of LANES floats, in the compiler's vector extensions, so that one source serves all
// instruction sets.
//
// NaN must propagate: vmax returns its second operand if one of them is NaN, so callers pass
// constants as the first.

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef float unaligned_vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t unaligned_vi __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t unaligned_vh __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))

constexpr float LOG2E = 1.44269504088896340736f;
constexpr double LOG2E_EXACT = 1.44269504088896340736, LN2_EXACT = 0.693147180559945309417;

INLINE vf load(const float* p) { return *reinterpret_cast<const unaligned_vf*>(p); }
INLINE void store(float* p, vf x) { *reinterpret_cast<unaligned_vf*>(p) = x; }
INLINE vi load(const int32_t* p) { return *reinterpret_cast<const unaligned_vi*>(p); }
INLINE vf splat(float x) { return x - vf{}; }
INLINE vi splat(int32_t x) { return x - vi{}; }
INLINE vu splat(uint32_t x) { return x - vu{}; }
// a > b ? a : b as one instruction; compilers do not find it for vector types.
INLINE vf vmax(vf a, vf b) {
#if LANES == 8
  return reinterpret_cast<vf>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#elif LANES == 16
  // All lanes of the form with a mask: GCC 12 warns of its own header for the one without.
  return reinterpret_cast<vf>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
  return a > b ? a : b;
#endif
}
template <class N>
INLINE N minimum(N a, N b) {
  return b < a ? b : a;
}
template <class N>
INLINE N maximum(N a, N b) {
  return a < b ? b : a;
}
INLINE int64_t round_up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }

INLINE vi lanes() {
  vi lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  return lane;
}

// Adds the upper half to the lower half repeatedly, so the order is fixed.
INLINE float horizontal_sum(vf a) {
  float x[LANES];
  store(x, a);
  for (int n = LANES / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) x[i] += x[i + n];
  return x[0];
}
INLINE float horizontal_max(vf a) {
  float x[LANES];
  store(x, a);
  for (int n = LANES / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
  return x[0];
}

// Loads 16-bit floats as float32. `load_first` loads `count` lanes and sets the others to zero.
INLINE vf load(const bf16* p) {
  vu x = __builtin_convertvector(*reinterpret_cast<const unaligned_vh*>(p), vu) << 16;
  return reinterpret_cast<vf>(x);
}
INLINE vf load(const f16* p) {
  vu x = __builtin_convertvector(*reinterpret_cast<const unaligned_vh*>(p), vu);
  vu magnitude = (x & 0x7fffu) << 13, sign = (x & 0x8000u) << 16;
  vu finite = reinterpret_cast<vu>(reinterpret_cast<vf>(magnitude) * 0x1p112f);
  vu value = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return reinterpret_cast<vf>(value | sign);
}
// Two bf16 in a lane, see product.h.
struct Pair {
  bf16 first, second;
};
INLINE vf load(const Pair* p) {
  typedef float vector __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
  return *reinterpret_cast<const vector*>(p);
}
template <class X>
INLINE vf load_first(const X* p, int count) {
  X padded[LANES];
  memset(padded, 0, sizeof padded);
  memcpy(padded, p, sizeof(X) * count);
  return load(padded);
}
template <class X>
INLINE float load_one(const X* p) {
  return load_first(p, 1)[0];
}
INLINE float load_one(const float* p) { return *p; }

// 2^t for t <= 0, within 2 ulp; exactly 1 at t = 0, and 0 from about t = -126 down.
INLINE vf exp2v(vf t) {
  t = vmax(splat(-150.0f), t);
  vf whole = (t + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  vf f = t - whole;
  vf p = splat(0.001326472731307149f);
  p = p * f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  p = p * f + 1.0f;
#if LANES == 16
  return reinterpret_cast<vf>(
      _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(whole)));
#else
  const vu exponent = reinterpret_cast<vu>(__builtin_convertvector(whole, vi));
  const vf scaled = reinterpret_cast<vf>(reinterpret_cast<vu>(p) + (exponent << 23));
  return whole < -125.0f ? vf{} : scaled;
#endif
}

// tanh as a rational function, within a few ulp.
INLINE vf tanhv(vf x) {
  const vf end = splat(-7.90531110763549805f);
  x = -vmax(end, -vmax(end, x));
  vf y = x * x;
  vf p = splat(-2.76076847742355e-16f);
  p = p * y + 2.00018790482477e-13f;
  p = p * y + -8.60467152213735e-11f;
  p = p * y + 5.12229709037114e-08f;
  p = p * y + 1.48572235717979e-05f;
  p = p * y + 6.37261928875436e-04f;
  p = p * y + 4.89352455891786e-03f;
  vf q = splat(1.19825839466702e-06f);
  q = q * y + 1.18534705686654e-04f;
  q = q * y + 2.26843463243900e-03f;
  q = q * y + 4.89352518554385e-03f;
  return x * p / q;
}

// The derivative of tanh, 4 e / (1 + e)^2 with e = exp(-2 |x|): 1 - tanh^2 would lose all digits
// where tanh is near 1.
INLINE vf tanh_slope(vf x) {
  const vf e = exp2v((x > 0.0f ? x : -x) * (-2.0f * LOG2E)), one = e + 1.0f;
  return 4.0f * e / (one * one);
}

using attention::mix;
INLINE vu mix(vu x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}
