// From q k^T to masked logits in units of log2, and the way back for gradients.
//
// A strip of logits is a few kilobytes in the first-level cache; scores change it in place, in
// their order, and the mask comes last. -inf in a bias is MASKED, so that a softcap after it, which
// makes it finite, shows the pair again, and no other score does.

struct Scored {
  const Call& c;
  const Head& h;
  const HeadScore* score;  // those of this head

  // `slope`: for each softcap, d score / d logit [rows x BLOCK]; null in the forward pass.
  void apply(const KeyBlock& b, const Strip& strip, float* s, float* slope) const {
    for (int i = 0; i < c.score_count; i++) {
      const HeadScore& x = score[i];
      if (x.kind == ScoreKind::softcap) {
        softcap(*x.array * LOG2E, strip, s, slope);
        if (slope) slope += ROWS * BLOCK;
      } else if (x.kind == ScoreKind::diagonal) {
        add(x.array + (b.k0 - strip.i0 + c.T - 1), -1, 1, b, strip, s);
      } else {
        add(x.array + strip.i0 * x.row + b.k0 * x.column, x.row, x.column, b, strip, s);
      }
    }
    mask_strip(c, h, b, strip, s, BLOCK);
  }

  // ds, the gradient of the logits, becomes that of q k^T; arrays get theirs on the way.
  void pull(const KeyBlock& b, const Strip& strip, float* ds, const float* slope) const {
    slope += most(0, c.softcap_count - 1) * ROWS * BLOCK;
    for (int i = c.score_count - 1; i >= 0; i--) {
      const HeadScore& x = score[i];
      if (x.kind == ScoreKind::softcap) {
        for (int m = 0; m < strip.rows; m++)
          for (int j = strip.begin(); j < strip.end(); j += LANES) {
            const vf d = load(ds + m * BLOCK + j);  // 0 where masked, where the slope may be NaN
            store(ds + m * BLOCK + j, d == 0.0f ? d : d * load(slope + m * BLOCK + j));
          }
        slope -= ROWS * BLOCK;
      } else if (x.entries) {
        float* to = x.kind == ScoreKind::diagonal ? x.entries + (c.T - 1 - strip.i0) : x.entries;
        accumulate(to, x.kind == ScoreKind::diagonal ? -1 : 0, x.column, b, strip, ds);
      } else if (x.gradient) {
        accumulate(x.gradient + strip.i0 * x.gradient_row + b.k0 * x.column, x.gradient_row,
                   x.column, b, strip, ds);
      }
    }
  }

 private:
  INLINE void softcap(float cap, const Strip& strip, float* s, float* slope) {
    const float inverse = 1.0f / cap;
    for (int m = 0; m < strip.rows; m++)
      for (int j = strip.begin(); j < strip.end(); j += LANES) {
        const vf x = load(s + m * BLOCK + j) * inverse;
        store(s + m * BLOCK + j, tanhv(x) * cap);
        if (slope) store(slope + m * BLOCK + j, tanh_slope(x));
      }
  }

  // s[m][j] += array[m * row + j * column], natural units.
  void add(const float* array, int64_t row, int64_t column, const KeyBlock& b, const Strip& strip,
           float* s) const {
    const int end = least<int64_t>(strip.end(), c.S - b.k0);
    for (int m = 0; m < strip.rows; m++, array += row)
      for (int j = strip.begin(); j < end; j += LANES) {
        const vf x = column == 0               ? splat(*array)
                     : j + LANES <= c.S - b.k0 ? load(array + j)
                                               : load_first(array + j, end - j);
        const vf sum = load(s + m * BLOCK + j) + x * LOG2E;
        store(s + m * BLOCK + j, x == -INFINITY ? splat(MASKED) : vmax(splat(MASKED), sum));
      }
  }

  void accumulate(float* to, int64_t row, int64_t column, const KeyBlock& b, const Strip& strip,
                  const float* ds) const {
    const int end = least<int64_t>(strip.end(), c.S - b.k0);
    for (int m = 0; m < strip.rows; m++, to += row) {
      if (column == 0) {
        vf sum = vf{};  // beyond `end` ds is 0
        for (int j = strip.begin(); j < strip.end(); j += LANES) sum += load(ds + m * BLOCK + j);
        *to += horizontal_sum(sum);
        continue;
      }
      int j = strip.begin();
      for (; j + LANES <= end; j += LANES) store(to + j, load(to + j) + load(ds + m * BLOCK + j));
      for (; j < end; j++) to[j] += ds[m * BLOCK + j];
    }
  }
};

// p *= what dropout multiplies row i's probabilities by, in columns [begin, end) of a block.
INLINE vf dropout_factor(const Head& h, uint32_t row_hash, int64_t k) {
  const vu hash = mix(row_hash ^ (reinterpret_cast<vu>(lanes()) + uint32_t(k)) * SPREAD_K);
  return hash < h.threshold ? splat(h.kept) : vf{};
}
INLINE uint32_t row_hash(const Head& h, int64_t i) {
  return mix(h.dropout_hash ^ uint32_t(i) * SPREAD_Q);
}
