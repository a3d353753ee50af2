// The register tile: c [M x V vectors] = or += a [M x n] b [n x V vectors].
//
// An iteration of the loop over n reads V vectors of b and M scalars of a, and does M * V
// multiply-adds on accumulators that stay in registers. ROWS x 2 accumulators, two vectors of b and
// one broadcast scalar of a use almost all registers (16 registers: ROWS = 6; 32: ROWS = 12). Each
// load feeds at least two multiply-adds, so the loop runs at the peak multiply-add rate as long as
// b is in the L1 cache.

constexpr int PANEL = 2 * LANES;  // columns of a register tile

// Element (m, k) of a is at a[m * A + k * lda], or with A = 0 at a[m * lda + k].
// Row k of b is at b + k * ldb.
template <int M, int V, int A, bool ADD, class X = float>
INLINE void product(int64_t n, const float* a, int64_t lda, const X* b, int64_t ldb, float* c,
                    int64_t ldc) {
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
        const vf left = splat(a[m * A]);
        for (int v = 0; v < V; v++) sum[m][v] += left * right[v];
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
        const vf left = splat(m % 3 == 0 ? r[0] : m % 3 == 1 ? r[lda] : r[twice]);
        for (int v = 0; v < V; v++) sum[m][v] += left * right[v];
      }
      for (int m = 0; m < M; m += 3) row[m / 3]++;
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) {  // adding whole sums to c, not terms, loses fewer digits
      float* to = c + m * ldc + v * LANES;
      store(to, ADD ? load(to) + sum[m][v] : sum[m][v]);
    }
}
