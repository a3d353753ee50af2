// The register tile: c [M x V vectors] = or += a [M x n] b [n x V vectors].
//
// An iteration of the loop over n reads V vectors of b and M scalars of a, and does M * V
// multiply-adds on accumulators that stay in registers. ROWS x 2 accumulators, two vectors of b and
// one broadcast scalar of a use almost all registers (16 registers: ROWS = 6; 32: ROWS = 12). Each
// load feeds at least two multiply-adds, so the loop runs at the peak multiply-add rate as long as
// b is in the L1 cache.
//
// Where the processor multiplies bf16, elements of a and b may be pairs: two terms of the sum,
// which are multiplied exactly and added in float32, at twice the rate of floats; denormal entries
// count as 0. The sum is multiplied by `factor` at its end, because an entry times a factor is not
// a bf16.

constexpr int PANEL = 2 * LANES;  // columns of a register tile

INLINE vf broadcast(float, const float* p) { return splat(*p); }
INLINE vf multiply_add(float, vf a, vf b, vf sum) { return sum + a * b; }
INLINE vf finished(float, vf sum, float) { return sum; }

template <class X>
constexpr bool IN_PAIRS = false;  // whether rows of X are multiplied in pairs
#ifdef BF16_PRODUCTS
template <>
constexpr bool IN_PAIRS<bf16> = true;
INLINE vf broadcast(Pair, const float* p) {  // as bits: as floats, they might be flushed to zero
  int32_t bits;
  memcpy(&bits, p, sizeof bits);
  return reinterpret_cast<vf>(splat(bits));
}
INLINE vf multiply_add(Pair, vf a, vf b, vf sum) {
  return reinterpret_cast<vf>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}
INLINE vf finished(Pair, vf sum, float factor) { return sum * factor; }
#endif

// Element (m, k) of a is at a[m * A + k * lda], or with A = 0 at a[m * lda + k].
// Row k of b is at b + k * ldb.
template <int M, int V, int A, bool ADD, class Element = float, class X = float>
INLINE void product(int64_t n, const float* a, int64_t lda, const X* b, int64_t ldb, float* c,
                    int64_t ldc, float factor = 1) {
  vf sum[M][V];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) sum[m][v] = vf{};
  if constexpr (A > 0) {
#pragma GCC unroll 1
    for (int64_t k = 0; k < n; k++, a += lda, b += ldb) {
      vf right[V];
      for (int v = 0; v < V; v++) right[v] = load(b + v * LANES);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const vf left = broadcast(Element{}, a + m * A);
        for (int v = 0; v < V; v++) sum[m][v] = multiply_add(Element{}, left, right[v], sum[m][v]);
      }
    }
  } else {
    const float* row[(M + 2) / 3];  // a pointer per three rows; the others are lda and 2 lda away
    for (int m = 0; m < M; m += 3) row[m / 3] = a + m * lda;
    const int64_t twice = 2 * lda;
#pragma GCC unroll 1
    for (int64_t k = 0; k < n; k++, b += ldb) {
      vf right[V];
      for (int v = 0; v < V; v++) right[v] = load(b + v * LANES);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const float* r = row[m / 3];
        const vf left = broadcast(Element{}, r + (m % 3 == 0 ? 0 : m % 3 == 1 ? lda : twice));
        for (int v = 0; v < V; v++) sum[m][v] = multiply_add(Element{}, left, right[v], sum[m][v]);
      }
      for (int m = 0; m < M; m += 3) row[m / 3]++;
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) {  // adding whole sums to c, not terms, loses fewer digits
      float* to = c + m * ldc + v * LANES;
      const vf x = finished(Element{}, sum[m][v], factor);
      store(to, ADD ? load(to) + x : x);
    }
}

// How the rows of q and k, or of dout and v, are packed for the products of one by the other.
struct RowFormat {
  bool pairs;
  int64_t width;  // of a packed row, in floats

  template <class X>
  static RowFormat of(int64_t width) {
    const bool pairs = IN_PAIRS<X> && width % 2 == 0;
    return {pairs, pairs ? width / 2 : width};
  }
};

// A register tile of such products, c [ROWS x PANEL] = rows of a times rows of b.
template <class X>
INLINE void row_products(RowFormat f, const float* a, int64_t lda, const float* b, float factor,
                         float* c) {
  if constexpr (IN_PAIRS<X>)
    if (f.pairs)
      return product<ROWS, 2, 0, false, Pair>(f.width, a, lda, b, PANEL, c, BLOCK, factor);
  product<ROWS, 2, 0, false>(f.width, a, lda, b, PANEL, c, BLOCK);
}
