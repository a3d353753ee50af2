// The forward pass: a running softmax over blocks of keys.
//
//   item: some query rows, of all query heads of one key-value head
//   for each block of keys                            L2 cache: K as columns, V as panels
//     for each query head
//       for each strip of ROWS queries
//         s = q k^T, one register tile at a time      L1 cache: a panel of K, a strip of s
//         scores, mask, maximum, p = 2^(s - m), sum   in place in s
//         out = out * 2^(old m - m) + p v             L1 cache: a panel of V
//
// A block is packed once for all rows of the item and all query heads. Each lane sums separately,
// so a row needs one horizontal addition, at the end. The result of a row does not depend on the
// item that it belongs to, because strips and blocks begin at multiples of their sizes.

struct ForwardBuffers {
  float *k, *v, *q, *out, *sum, *row_max, *s;
  ForwardBuffers(Arena& a, const Call& c, int64_t rows) {
    const int64_t padded = c.G * round_up(rows, ROWS), W = round_up(c.D, PANEL);
    k = a.floats(BLOCK * c.H);
    v = a.floats(BLOCK * W);
    q = a.floats(padded * c.H + LANES);
    out = a.floats(padded * W);
    sum = a.floats(padded * LANES);
    row_max = a.floats(padded);
    s = a.floats(ROWS * BLOCK);
  }
};

// In place: from the logits of a strip to probabilities. Rescales the running sums to the new
// maxima.
INLINE void softmax_strip(const Head& h, const KeyBlock& b, const Strip& strip, int64_t W, float* s,
                          float* row_max, float* sum, float* out) {
  const int begin = strip.begin(), end = strip.end();
  for (int m = 0; m < strip.rows; m++) {
    float* row = s + m * BLOCK;
    vf high[4];  // independent chains, to hide the latency of the maximum
    for (int i = 0; i < 4; i++) high[i] = splat(MASKED);
    for (int j = begin; j < end; j += UNIT)
      for (int i = 0; i < UNIT / LANES; i++)
        high[i % 4] = vmax(high[i % 4], load(row + j + i * LANES));
    const vf highest = vmax(vmax(high[0], high[1]), vmax(high[2], high[3]));
    const float old_max = row_max[m], new_max = maximum(old_max, horizontal_max(highest));
    const vf shift = splat(new_max);
    vf total = vf{};
    for (int j = begin; j < end; j += LANES) {
      const vf p = exp2v(load(row + j) - shift);
      store(row + j, p);
      total += p;
    }
    if (h.dropout_scale != 0) {
      const uint32_t hash = row_hash(h, strip.i0 + m);
      for (int j = begin; j < end; j += LANES)
        store(row + j, load(row + j) * dropout_factor(h, hash, b.k0 + j));
    }
    if (new_max != old_max) {
      const vf rescale = exp2v(splat(old_max - new_max));
      row_max[m] = new_max;
      total += load(sum + m * LANES) * rescale;
      for (int64_t d = 0; d < W; d += LANES)
        store(out + m * W + d, load(out + m * W + d) * rescale);
    } else {
      total += load(sum + m * LANES);
    }
    store(sum + m * LANES, total);
  }
  for (int m = strip.rows; m < ROWS; m++)
    for (int j = begin; j < end; j += LANES) store(s + m * BLOCK + j, vf{});
}

// Output, m and log l of one row, from base 2 to base e. The rounding error of m goes into log l.
INLINE void finish_row(const Call& c, const Head& h, int64_t i, float row_max, float total,
                       const float* weighted) {
  float* out = h.out + i * c.out.row;
  float m2 = row_max;
  double l = total;
  float rescale = 1;
  if (c.sink) {
    const float sink = h.sink * LOG2E;
    m2 = maximum(row_max, sink);
    rescale = row_max > NO_MAXIMUM ? exp2f(row_max - m2) : 0;
    l = double(total) * rescale + (sink > MASKED ? exp2(double(sink) - m2) : 0);
  }
  const bool empty = l == 0;
  const float scale = empty ? 0 : rescale / float(l);
  for (int64_t d = 0; d < c.D; d++) out[d] = total == 0 ? 0 : weighted[d] * scale;
  const float m = empty ? 0 : float(m2 * LN2_EXACT);
  h.m[i] = m;
  h.log_l[i] = empty ? -INFINITY : float(log(l) + (m2 * LN2_EXACT - m));
}

template <class X>
static void forward_item(const Call& c, const Item& item, char* memory) {
  Arena arena(memory);
  const int64_t rows = item.end - item.begin, strips = (rows + ROWS - 1) / ROWS;
  const ForwardBuffers x(arena, c, rows);
  const int64_t W = round_up(c.D, PANEL);
  const RowFormat format = RowFormat::of<X>(c.H);
  for (int64_t g = 0; g < c.G; g++) {
    const Head h = c.head(item.e, g);
    pack_left(format, static_cast<const X*>(h.q) + item.begin * c.q.row, c.q.row, rows,
              strips * ROWS, c.H, h.scale * LOG2E, x.q + g * strips * ROWS * format.width);
  }
  const int64_t padded = c.G * strips * ROWS;
  memset(x.out, 0, sizeof(float) * padded * W);
  memset(x.sum, 0, sizeof(float) * padded * LANES);
  for (int64_t i = 0; i < padded; i++) x.row_max[i] = NO_MAXIMUM;

  for (int64_t k0 = 0; k0 < c.S; k0 += c.block_k) {
    UnitRange visited;  // by any query head
    for (int64_t g = 0; g < c.G; g++) {
      const Head h = c.head(item.e, g);
      const KeyBlock b(h, c.S, k0, c.block_k);
      visited.include(
          visited_units(c, h, b, RowExtremes(h, item.begin, item.end), item.begin, item.end));
    }
    if (!visited.end) continue;
    // Pack only the units between the first and the last that are visited.
    const int64_t first = visited.first * UNIT, last = visited.end * UNIT;
    const int64_t key_count = minimum<int64_t>(last, c.S - k0) - first, padded_keys = last - first;
    const Head shared = c.head(item.e, 0);
    const X* k = static_cast<const X*>(shared.k) + (k0 + first) * c.k.row;
    const X* v = static_cast<const X*>(shared.v) + (k0 + first) * c.v.row;
    pack_columns(format, k, c.k.row, key_count, padded_keys, c.H, x.k);
    NonFiniteRows nonfinite;
    if (pack_rows(v, c.v.row, key_count, padded_keys, c.D, PANEL, 1, x.v))
      nonfinite.zero_out(x.v, key_count, padded_keys, c.D, PANEL);

    for (int64_t g = 0; g < c.G; g++) {
      const Head h = c.head(item.e, g);
      const KeyBlock b(h, c.S, k0, c.block_k);
      HeadScore scores[MAX_SCORES];
      for (int i = 0; i < c.score_count; i++) scores[i] = c.score(i, item.e, g);
      const Scored scored = {c, h, scores};
      for (int64_t t = 0; t < strips; t++) {
        const int64_t i0 = item.begin + t * ROWS, at = (g * strips + t) * ROWS;
        const Strip strip(c, h, b, i0, minimum<int64_t>(ROWS, item.end - i0), visited);
        if (!strip.units.end) continue;
        for (int j = strip.begin(); j < strip.end(); j += PANEL)
          if (strip.kind[j / UNIT])
            row_products<X>(format, x.q + at * format.width, format.width,
                            x.k + (j - first) * format.width, h.scale * LOG2E, x.s + j);
        scored.apply(b, strip, x.s, nullptr);
        softmax_strip(h, b, strip, W, x.s, x.row_max + at, x.sum + at * LANES, x.out + at * W);
        for (int j = strip.begin(), end; j < strip.end(); j = end) {  // runs of visited units
          for (end = j + UNIT;
               end < strip.end() && !strip.kind[j / UNIT] == !strip.kind[end / UNIT];)
            end += UNIT;
          if (!strip.kind[j / UNIT]) continue;
          for (int64_t d = 0; d < W; d += PANEL)
            product<ROWS, 2, BLOCK, true>(end - j, x.s + j, 1,
                                          x.v + d * padded_keys + (j - first) * PANEL, PANEL,
                                          x.out + at * W + d, W);
        }
        if (nonfinite.count)
          add_nonfinite_rows(nonfinite, strip.begin() - first, strip.end() - first, strip.rows,
                             x.s + first, BLOCK, 1, v, c.v.row, c.D, 1, x.out + at * W, W);
      }
    }
  }
  for (int64_t g = 0; g < c.G; g++) {
    const Head h = c.head(item.e, g);
    for (int64_t i = 0; i < rows; i++) {
      const int64_t at = g * strips * ROWS + i;
      finish_row(c, h, item.begin + i, x.row_max[at], horizontal_sum(load(x.sum + at * LANES)),
                 x.out + at * W);
    }
  }
}

static size_t forward_bytes(const Call& c, int64_t rows) {
  Arena arena;
  ForwardBuffers(arena, c, rows);
  return arena.used();
}
