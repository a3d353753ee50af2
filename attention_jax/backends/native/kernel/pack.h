// Copies rows, as float32, into the layout in which products read them.
//
// pack_columns: panels of PANEL rows, with the PANEL entries of a column contiguous; for the right
// operand of q k^T. pack_rows: panels of some columns, with the entries of a row contiguous; for
// the right operand of p v, or, with all columns in one panel, for the left operand.
//
// A block is packed once and read by all register tiles of an item. The last panel is padded with
// zeros.

// Transposes LANES vectors, by log2(LANES) rounds that interleave the first half of the vectors
// with the second.
#if LANES == 16
#define LOW(a, b) \
  __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH(a, b) \
  __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif LANES == 8
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

INLINE void transpose(vf* x) {
  vf y[LANES];
  for (int n = 1; n < LANES; n *= 2) {
    for (int i = 0; i < LANES / 2; i++) {
      y[2 * i] = LOW(x[i], x[i + LANES / 2]);
      y[2 * i + 1] = HIGH(x[i], x[i + LANES / 2]);
    }
    for (int i = 0; i < LANES; i++) x[i] = y[i];
  }
}

// The sums of LANES vectors, as one vector: halves are added as they are interleaved.
INLINE vf sums(vf* x) {
  for (int n = LANES / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) x[i] = LOW(x[i], x[i + n]) + HIGH(x[i], x[i + n]);
  return x[0];
}

// Packs rows [0, n) of x, of width H, padded with zeros to `padded_rows`.
template <class X>
static void pack_columns(const X* x, int64_t ld, int64_t n, int64_t padded_rows, int64_t H,
                         float* out) {
  for (int64_t p = 0; p < padded_rows; p += PANEL, out += H * PANEL)
    for (int half = 0; half < PANEL; half += LANES) {
      const int64_t rows = maximum<int64_t>(0, minimum<int64_t>(LANES, n - p - half));
      const X* first = x + (p + half) * ld;
      for (int64_t h = 0; h < H; h += LANES) {
        const int width = minimum<int64_t>(LANES, H - h);
        vf block[LANES];
        for (int64_t i = 0; i < LANES; i++)
          block[i] = i >= rows        ? vf{}
                     : width == LANES ? load(first + i * ld + h)
                                      : load_first(first + i * ld + h, width);
        transpose(block);
        for (int i = 0; i < width; i++) store(out + (h + i) * PANEL + half, block[i]);
      }
    }
}

// Packs columns in this format.
template <class X>
static void pack_columns(RowFormat f, const X* x, int64_t ld, int64_t n, int64_t padded_rows,
                         int64_t H, float* out) {
  if (f.pairs)
    pack_columns(reinterpret_cast<const Pair*>(x), ld / 2, n, padded_rows, f.width, out);
  else
    pack_columns(x, ld, n, padded_rows, H, out);
}

// Packs rows [0, n) of x, of this width, times `factor`, as panels of `panel` columns and
// `padded_rows` rows. Returns whether some entry is NaN or infinite.
template <class X>
static bool pack_rows(const X* x, int64_t ld, int64_t n, int64_t padded_rows, int64_t width,
                      int64_t panel, float factor, float* out) {
  vf zero = vf{};  // NaN once an entry is not finite
  for (int64_t h0 = 0; h0 < width; h0 += panel) {
    const int64_t end = minimum(panel, width - h0);
    for (int64_t i = 0; i < n; i++, out += panel) {
      const X* row = x + i * ld + h0;
      int64_t h = 0;
      for (; h + LANES <= end; h += LANES) {
        const vf y = load(row + h) * factor;
        zero += y * 0.0f;
        store(out + h, y);
      }
      for (; h < panel; h += LANES) {
        const vf y = h < end ? load_first(row + h, end - h) * factor : vf{};
        zero += y * 0.0f;
        store(out + h, y);
      }
    }
    memset(out, 0, sizeof(float) * panel * (padded_rows - n));
    out += panel * (padded_rows - n);
  }
  return !(horizontal_sum(zero) == 0.0f);
}

// Packs rows in this format, as the left operand; as floats they are multiplied by `factor`.
template <class X>
static void pack_left(RowFormat f, const X* x, int64_t ld, int64_t n, int64_t padded_rows,
                      int64_t H, float factor, float* out) {
  if (!f.pairs) {
    pack_rows(x, ld, n, padded_rows, H, H, factor, out);
    return;
  }
  for (int64_t i = 0; i < n; i++) memcpy(out + i * f.width, x + i * ld, sizeof(float) * f.width);
  memset(out + n * f.width, 0, sizeof(float) * f.width * (padded_rows - n));
}

// Packs rows [0, n) of floats as pairs of bf16. Returns whether each float is one; if not, the
// result is of no use.
static bool pack_pairs(const float* x, int64_t ld, int64_t n, int64_t padded_rows, int64_t width,
                       float* out) {
  uint32_t rest = 0;
  for (int64_t i = 0; i < n; i++)
    for (int64_t h = 0; h < width; h++) {
      uint32_t two[2];
      memcpy(two, x + i * ld + 2 * h, sizeof two);
      rest |= two[0] | two[1];
      const uint32_t pair = two[0] >> 16 | (two[1] & 0xffff0000u);
      memcpy(out + i * width + h, &pair, sizeof pair);
    }
  memset(out + n * width, 0, sizeof(float) * width * (padded_rows - n));
  return !(rest & 0xffffu);
}

// Rows that hold NaN or infinity. Masked rows must not affect a sum, but 0 * NaN is NaN: so these
// rows are zeroed in the packed copy, and `add_nonfinite_rows` adds them where their weight is not
// 0.
struct NonFiniteRows {
  int count = 0;
  int16_t row[BLOCK];

  void zero_out(float* packed, int64_t n, int64_t padded_rows, int64_t width, int64_t panel) {
    for (int64_t i = 0; i < n; i++) {
      float zero = 0;
      for (int64_t h = 0; h < width; h++)
        zero += packed[h / panel * panel * padded_rows + i * panel + h % panel] * 0.0f;
      if (zero == 0.0f) continue;
      row[count++] = i;
      for (int64_t h = 0; h < width; h++)
        packed[h / panel * panel * padded_rows + i * panel + h % panel] = 0;
    }
  }
};

// c[m] += a(m, i) * factor * x[i] for the recorded rows i in [begin, end) where a(m, i) is not 0.
// Element (m, i) of a is at a[m * am + i * ai].
template <class X>
static void add_nonfinite_rows(const NonFiniteRows& nonfinite, int64_t begin, int64_t end, int M,
                               const float* a, int64_t am, int64_t ai, const X* x, int64_t ld,
                               int64_t width, float factor, float* c, int64_t ldc) {
  for (int b = 0; b < nonfinite.count; b++) {
    const int64_t i = nonfinite.row[b];
    if (i < begin || i >= end) continue;
    for (int m = 0; m < M; m++) {
      const float weight = a[m * am + i * ai];
      if (weight == 0.0f) continue;
      for (int64_t h = 0; h < width; h++)
        c[m * ldc + h] += weight * (load_one(x + i * ld + h) * factor);
    }
  }
}
