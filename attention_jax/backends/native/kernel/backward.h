// The backward pass: five products for each block of keys and block of queries.
//
//   item: a block of keys of one key-value head      L2 cache: K, V as columns, K as panels, dK, dV
//     for each step: QUERIES rows of a query head    L2 cache: q, dout, p and ds of the step
//       for each strip of ROWS queries               L1 cache: a strip of p and ds
//         s = q k^T, p = 2^(s - lse)
//         dp = dout v^T, ds = p (dp - delta)
//         dq += ds k
//       dv += p^T dout, dk += ds^T q                 ROWS keys at a time
//
// Only one item writes a given row of dk and dv. All key blocks of a head add to the same dq, in
// the order of the blocks: an item waits before each step until the item of the previous block has
// done that step. So sums do not depend on the number of threads, and no thread needs its own copy
// of dq. Items are started in numerical order, so an item never waits for one that has not started.
// The first block sets dq to zero and computes delta; the last one multiplies dq by the scale.
//
// The gradient of a score's array is accumulated in the same order. If key-value heads share the
// array, or query heads an array that broadcasts over keys, an item waits for the previous item of
// any head, until that has done all query heads of these rows.
// Gradient entries to which several steps of an item add (of a bias by distance, or a bias that
// broadcasts over queries) are first summed within the item and added in an extra step at its end.

constexpr int QUERIES = 96;  // query rows per step: a multiple of ROWS and TABLE_ROWS

// The number of gradient entries of a score to which several steps of an item add, per query head;
// 0 if no two steps of an item, or only those of several query heads, add to the same entries.
INLINE int64_t shared_entry_count(const Call& c, const Score& x) {
  if (!x.gradient) return 0;
  if (x.kind == ScoreKind::diagonal) return c.T - 1 + BLOCK;  // by j - i
  if (x.gradient.rows > 1) return 0;
  return x.gradient.columns > 1 ? BLOCK : 1;
}

struct Totals {
  double dscale, dsink;
};

struct BackwardBuffers {
  float *k_columns, *v_columns, *k_panels, *dk, *dv, *q, *dout, *p, *ds, *slope, *tile;
  float *q_pairs, *dout_pairs;  // where products are of pairs
  float *shift, *rest;
  float* shared_gradient[MAX_SCORES];  // [G shared_entry_count] for each score, or null
  Totals* totals;                      // [G]
  BackwardBuffers(Arena& a, const Call& c) {
    const int64_t HW = round_up(c.H, PANEL), DW = round_up(c.D, PANEL);
    k_columns = a.floats(BLOCK * c.H);
    v_columns = a.floats(BLOCK * c.D);
    k_panels = a.floats(BLOCK * HW);
    dk = a.floats(BLOCK * HW);
    dv = a.floats(BLOCK * DW);
    q = a.floats(QUERIES * HW);
    dout = a.floats(QUERIES * DW);
    q_pairs = a.floats(QUERIES * c.H / 2);
    dout_pairs = a.floats(QUERIES * c.D / 2);
    p = a.floats(QUERIES * BLOCK);
    ds = a.floats(QUERIES * BLOCK);
    slope = a.floats(int64_t(c.softcap_count) * ROWS * BLOCK);
    tile = a.floats(ROWS * PANEL);
    shift = a.floats(QUERIES);
    rest = a.floats(QUERIES);
    for (int i = 0; i < c.score_count; i++) {
      const int64_t count = shared_entry_count(c, c.scores[i]);
      shared_gradient[i] = count ? a.floats(c.G * count) : nullptr;
    }
    totals = reinterpret_cast<Totals*>(a.floats(c.G * sizeof(Totals) / sizeof(float)));
  }
};

// The lse of the rows of a step in two floats, p = 2^((s - shift) - rest): one float has too few
// digits when logits are large.
INLINE void rows_of_step(const Head& h, int64_t i0, int64_t rows, const BackwardBuffers& x) {
  for (int64_t i = 0; i < rows; i++) {
    const double lse = h.m[i0 + i] * LOG2E_EXACT;
    const bool empty = h.log_l[i0 + i] == -INFINITY;
    x.shift[i] = empty ? -MASKED : float(lse);
    x.rest[i] = empty ? 0 : float((lse - x.shift[i]) + h.log_l[i0 + i] * LOG2E_EXACT);
  }
}

// delta_i - dlse_i with delta_i = dout_i . out_i, computed by the first key block for all others.
INLINE void deltas_of_step(const Call& c, const Head& h, int64_t i0, int64_t rows, float* delta) {
  for (int64_t i = 0; i < rows; i++) {
    const float *out = h.out + (i0 + i) * c.out.row, *dout = h.dout + (i0 + i) * c.dout.row;
    vf sum = vf{};
    int64_t d = 0;
    for (; d + LANES <= c.D; d += LANES) {
      const vf y = load(out + d);
      sum += y == 0.0f ? vf{} : y * load(dout + d);
    }
    float total = horizontal_sum(sum);
    for (; d < c.D; d++) total += out[d] == 0 ? 0 : out[d] * dout[d];
    delta[i] = total - (h.log_l[i0 + i] == -INFINITY ? 0 : h.dlse[i0 + i]);
  }
}

// In place: p from logits to probabilities after dropout, ds from dp to the gradient of the logits.
INLINE void gradient_strip(const Head& h, const KeyBlock& b, const Strip& strip, const float* shift,
                           const float* rest, const float* delta, float* p, float* ds) {
  const int begin = strip.begin(), end = strip.end();
  for (int m = 0; m < strip.rows; m++) {
    const vf high = splat(shift[m]), low = splat(rest[m]), minus = splat(delta[m]);
    const uint32_t hash = row_hash(h, strip.i0 + m);
    for (int j = begin; j < end; j += LANES) {
      float *at = p + m * BLOCK + j, *to = ds + m * BLOCK + j;
      const vf prob = exp2v((load(at) - high) - low);
      vf dp = load(to), dropped = prob;
      if (h.dropout_scale != 0) {
        const vf factor = dropout_factor(h, hash, b.k0 + j);
        dp *= factor;
        dropped *= factor;
      }
      store(at, dropped);
      store(to, prob != 0.0f ? prob * (dp - minus) : vf{});  // dp of a masked pair may be NaN
    }
  }
}

// Writes zeros where the strip has no visible pair but the products dv and dk of the step read.
INLINE void zero_unvisited(const Strip& strip, int first, int last, float* x) {
  for (int u = first; u < last; u++)
    for (int m = 0; m < ROWS; m++)
      if (u < strip.units.first || u >= strip.units.end || m >= strip.rows)
        memset(x + m * BLOCK + u * UNIT, 0, sizeof(float) * UNIT);
}

// After the last key block: multiplies dq by the scale, and adds to the gradients of scale and
// sink.
template <class X>
static void finish_rows(const Call& c, const Head& h, int64_t i0, int64_t rows, const X* q,
                        const float* delta, Totals* totals) {
  for (int64_t i = 0; i < rows; i++, q += c.q.row) {
    float* dq = h.dq + (i0 + i) * c.dq.row;
    for (int64_t k = 0; k < c.H; k++) {
      if (h.dscale && dq[k] != 0) totals->dscale += double(dq[k]) * load_one(q + k);
      dq[k] *= h.scale;
    }
    if (h.dsink) {
      const double lse = double(h.m[i0 + i]) + h.log_l[i0 + i];
      if (h.sink > MASKED && h.log_l[i0 + i] != -INFINITY)
        totals->dsink -= exp(h.sink - lse) * delta[i];
    }
  }
}

// Adds the gradient entries that were summed within the item, see shared_entry_count.
static void add_shared_gradients(const Call& c, const Item& item, const BackwardBuffers& x) {
  for (int i = 0; i < c.score_count; i++) {
    if (!x.shared_gradient[i]) continue;
    const Score& score = c.scores[i];
    const bool diagonal = score.kind == ScoreKind::diagonal;
    const int64_t first = score.gradient.columns > 1 ? item.begin : 0;
    const int64_t count = diagonal                     ? c.T - 1 + (item.end - item.begin)
                          : score.gradient.columns > 1 ? item.end - item.begin
                                                       : 1;
    for (int64_t g = 0; g < c.G; g++) {
      float* to = score.gradient.at<float>(item.e, g) + first;
      const float* from = x.shared_gradient[i] + g * shared_entry_count(c, score);
      for (int64_t j = 0; j < count; j++) to[j] += from[j];
    }
  }
}

template <class X>
static void backward_item(const Call& c, const Item& item, char* memory, Progress* progress) {
  Arena arena(memory);
  const BackwardBuffers x(arena, c);
  const int64_t HW = round_up(c.H, PANEL), DW = round_up(c.D, PANEL);
  const int64_t k0 = item.begin, key_count = item.end - k0, padded_keys = round_up(key_count, UNIT);
  const bool last = item.end == c.S;
  const Head owner = c.head(item.e, 0);
  const X* k = static_cast<const X*>(owner.k) + k0 * c.k.row;
  const X* v = static_cast<const X*>(owner.v) + k0 * c.v.row;
  bool packed = false;
  RowFormat q_format = RowFormat::of<X>(c.H), dout_format = RowFormat::of<X>(c.D);
  NonFiniteRows nonfinite_k, nonfinite_q, nonfinite_dout;
  memset(x.dk, 0, sizeof(float) * BLOCK * HW);
  memset(x.dv, 0, sizeof(float) * BLOCK * DW);
  bool extra_step = false;
  for (int i = 0; i < c.score_count; i++) {
    if (!x.shared_gradient[i]) continue;
    memset(x.shared_gradient[i], 0, sizeof(float) * c.G * shared_entry_count(c, c.scores[i]));
    extra_step = true;
  }
  for (int64_t g = 0; g < c.G; g++) x.totals[g] = {0, 0};
  int64_t step = 0;
  for (int64_t t0 = 0; t0 < c.T; t0 += QUERIES) {
    for (int64_t g = 0; g < c.G; g++, step++) {
      const Head h = c.head(item.e, g);
      const KeyBlock b(h, c.S, k0, key_count);
      HeadScore scores[MAX_SCORES];
      for (int i = 0; i < c.score_count; i++) {
        scores[i] = c.score(i, item.e, g);
        if (x.shared_gradient[i])
          scores[i].shared_gradient = x.shared_gradient[i] + g * shared_entry_count(c, c.scores[i]);
      }
      const Scored scored = {c, h, scores};
      const int64_t awaited =
          progress->across_heads ? step - g + c.G - 1 : step;  // all query heads
      const int64_t rows = minimum<int64_t>(QUERIES, c.T - t0), strips = (rows + ROWS - 1) / ROWS;
      const UnitRange visited =
          visited_units(c, h, b, RowExtremes(h, t0, t0 + rows), t0, t0 + rows);
      if (!visited.end && k0 > 0 && !last) {
        progress->wait_for_previous(item.number, awaited, c.E);
        progress->mark_done(item.number, step);
        continue;
      }
      const X* q = static_cast<const X*>(h.q) + t0 * c.q.row;
      const float* dout = h.dout + t0 * c.dout.row;
      rows_of_step(h, t0, rows, x);
      nonfinite_q.count = nonfinite_dout.count = 0;
      if (pack_rows(q, c.q.row, rows, strips * ROWS, c.H, HW, h.scale * LOG2E, x.q))
        nonfinite_q.zero_out(x.q, rows, rows, c.H, HW);
      progress->wait_for_previous(item.number, awaited, c.E);
      float* delta = c.delta + (item.e * c.G + g) * c.T + t0;
      if (k0 == 0) {
        deltas_of_step(c, h, t0, rows, delta);
        for (int64_t i = 0; i < rows; i++)
          memset(h.dq + (t0 + i) * c.dq.row, 0, sizeof(float) * c.H);
      }
      if (visited.end) {
        if (!packed) {
          pack_columns(q_format, k, c.k.row, key_count, padded_keys, c.H, x.k_columns);
          pack_columns(dout_format, v, c.v.row, key_count, padded_keys, c.D, x.v_columns);
          if (pack_rows(k, c.k.row, key_count, padded_keys, c.H, PANEL, 1, x.k_panels))
            nonfinite_k.zero_out(x.k_panels, key_count, padded_keys, c.H, PANEL);
          packed = true;
        }
        if (pack_rows(dout, c.dout.row, rows, strips * ROWS, c.D, DW, 1, x.dout))
          nonfinite_dout.zero_out(x.dout, rows, rows, c.D, DW);
        if (q_format.pairs) pack_left(q_format, q, c.q.row, rows, strips * ROWS, c.H, 1, x.q_pairs);
        // The gradient of a bf16 output is bf16 too; of anything else, products use floats.
        if (dout_format.pairs &&
            !pack_pairs(x.dout, DW, rows, strips * ROWS, dout_format.width, x.dout_pairs)) {
          dout_format = {false, c.D};
          pack_columns(v, c.v.row, key_count, padded_keys, c.D, x.v_columns);
        }
        const float *left_q = q_format.pairs ? x.q_pairs : x.q,
                    *left_dout = dout_format.pairs ? x.dout_pairs : x.dout;
        const int64_t ldq = q_format.pairs ? q_format.width : HW,
                      ldd = dout_format.pairs ? dout_format.width : DW;
        const int first = maximum(0, visited.first - 1), end = minimum(UNITS, visited.end + 1);
        int16_t row_begin[UNITS], row_end[UNITS];  // the rows of the step that visit each unit
        for (int u = first; u < end; u++) row_begin[u] = QUERIES, row_end[u] = 0;
        for (int64_t t = 0; t < strips; t++) {
          const int64_t i0 = t0 + t * ROWS;
          float *p = x.p + t * ROWS * BLOCK, *ds = x.ds + t * ROWS * BLOCK;
          const Strip strip(c, h, b, i0, minimum<int64_t>(ROWS, t0 + rows - i0), visited);
          if (strip.units.end) {
            for (int j = strip.begin(); j < strip.end(); j += PANEL) {
              row_products<X>(q_format, left_q + t * ROWS * ldq, ldq,
                              x.k_columns + j * q_format.width, h.scale * LOG2E, p + j);
              row_products<X>(dout_format, left_dout + t * ROWS * ldd, ldd,
                              x.v_columns + j * dout_format.width, 1, ds + j);
            }
            scored.apply(b, strip, p, c.softcap_count ? x.slope : nullptr);
            gradient_strip(h, b, strip, x.shift + t * ROWS, x.rest + t * ROWS, delta + t * ROWS, p,
                           ds);
            if (c.score_count) scored.backward(b, strip, ds, x.slope);
          }
          zero_unvisited(strip, first, end, p);
          zero_unvisited(strip, first, end, ds);
          if (!strip.units.end) continue;
          for (int u = strip.units.first; u < strip.units.end; u++) {
            row_begin[u] = minimum<int16_t>(row_begin[u], t * ROWS);
            row_end[u] = t * ROWS + ROWS;
          }
          for (int64_t d = 0; d < HW; d += PANEL) {
            product<ROWS, 2, BLOCK, false>(strip.end() - strip.begin(), ds + strip.begin(), 1,
                                           x.k_panels + d * padded_keys + strip.begin() * PANEL,
                                           PANEL, x.tile, PANEL);
            for (int m = 0; m < strip.rows; m++) {
              float* row = h.dq + (i0 + m) * c.dq.row + d;
              if (d + PANEL <= c.H)
                for (int y = 0; y < PANEL; y += LANES)
                  store(row + y, load(row + y) + load(x.tile + m * PANEL + y));
              else
                for (int y = 0; y < c.H - d; y++) row[y] += x.tile[m * PANEL + y];
            }
          }
          if (nonfinite_k.count)
            add_nonfinite_rows(nonfinite_k, strip.begin(), strip.end(), strip.rows, ds, BLOCK, 1, k,
                               c.k.row, c.H, 1, h.dq + i0 * c.dq.row, c.dq.row);
        }
        for (int j = first * UNIT / ROWS * ROWS; j < end * UNIT && j + ROWS <= BLOCK; j += ROWS) {
          const int u = maximum(first, j / UNIT), w = minimum(end - 1, (j + ROWS - 1) / UNIT);
          const int64_t r0 = minimum(row_begin[u], row_begin[w]),
                        r1 = maximum(row_end[u], row_end[w]);
          if (r0 >= r1) continue;
          for (int64_t d = 0; d < DW; d += PANEL)
            product<ROWS, 2, 1, true>(r1 - r0, x.p + r0 * BLOCK + j, BLOCK, x.dout + r0 * DW + d,
                                      DW, x.dv + j * DW + d, DW);
          for (int64_t d = 0; d < HW; d += PANEL)
            product<ROWS, 2, 1, true>(r1 - r0, x.ds + r0 * BLOCK + j, BLOCK, x.q + r0 * HW + d, HW,
                                      x.dk + j * HW + d, HW);
        }
        const int64_t j = visited.first * UNIT, n = visited.end * UNIT - j;
        if (nonfinite_dout.count)
          add_nonfinite_rows(nonfinite_dout, 0, rows, n, x.p + j, 1, BLOCK, dout, c.dout.row, c.D,
                             1, x.dv + j * DW, DW);
        if (nonfinite_q.count)
          add_nonfinite_rows(nonfinite_q, 0, rows, n, x.ds + j, 1, BLOCK, q, c.q.row, c.H,
                             h.scale * LOG2E, x.dk + j * HW, HW);
      }
      if (last) finish_rows(c, h, t0, rows, q, delta, &x.totals[g]);
      progress->mark_done(item.number, step);
    }
  }
  for (int64_t g = 0; last && g < c.G; g++) {
    const Head h = c.head(item.e, g);
    if (h.dscale) *h.dscale = float(x.totals[g].dscale);
    if (h.dsink) *h.dsink = float(x.totals[g].dsink);
  }
  if (extra_step) {
    progress->wait_for_previous(item.number, step, c.E);
    add_shared_gradients(c, item, x);
    progress->mark_done(item.number, step);
  }
  for (int64_t j = 0; j < key_count; j++) {
    for (int64_t d = 0; d < c.H; d++)
      owner.dk[(k0 + j) * c.dk.row + d] = x.dk[j * HW + d] * float(LN2_EXACT);
    for (int64_t d = 0; d < c.D; d++) owner.dv[(k0 + j) * c.dv.row + d] = x.dv[j * DW + d];
  }
}

static size_t backward_bytes(const Call& c) {
  Arena arena;
  BackwardBuffers(arena, c);
  return arena.used();
}
