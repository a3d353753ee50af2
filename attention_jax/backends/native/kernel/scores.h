// From q k^T to masked logits in base 2 (times log2 e), and the backward pass of the scores.
//
// A strip of logits is a few kilobytes and stays in the L1 cache. Scores are applied to it in
// place, in their order, then the mask. A bias of -inf becomes MASKED; a softcap after it makes the
// logit finite, which unmasks the pair, and no other score does.

struct Scored {
  const Call& c;
  const Head& h;
  const HeadScore* score;  // [score_count]

  // slope: receives the derivative of each softcap, [rows x BLOCK]; null in the forward pass.
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

  // In place: from the gradient of the logits to that of q k^T. Adds to the gradients of the
  // arrays.
  void backward(const KeyBlock& b, const Strip& strip, float* ds, const float* slope) const {
    slope += maximum(0, c.softcap_count - 1) * ROWS * BLOCK;
    for (int i = c.score_count - 1; i >= 0; i--) {
      const HeadScore& x = score[i];
      if (x.kind == ScoreKind::softcap) {
        for (int m = 0; m < strip.rows; m++)
          for (int j = strip.begin(); j < strip.end(); j += LANES) {
            const vf d = load(ds + m * BLOCK + j);  // 0 if masked, where the slope may be NaN
            store(ds + m * BLOCK + j, d == 0.0f ? d : d * load(slope + m * BLOCK + j));
          }
        slope -= ROWS * BLOCK;
      } else if (x.shared_gradient) {
        float* to = x.kind == ScoreKind::diagonal ? x.shared_gradient + (c.T - 1 - strip.i0)
                                                  : x.shared_gradient;
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

  // s[m][j] += array[m * row + j * column] * log2 e.
  void add(const float* array, int64_t row, int64_t column, const KeyBlock& b, const Strip& strip,
           float* s) const {
    const int end = minimum<int64_t>(strip.end(), c.S - b.k0);
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
    const int end = minimum<int64_t>(strip.end(), c.S - b.k0);
    for (int m = 0; m < strip.rows; m++, to += row) {
      if (column == 0) {
        vf sum = vf{};  // ds is 0 from `end` on
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

// What dropout multiplies the probabilities of keys k .. k + LANES - 1 by.
INLINE vf dropout_factor(const Head& h, uint32_t row_hash, int64_t k) {
  const vu hash = mix(row_hash ^ (reinterpret_cast<vu>(lanes()) + uint32_t(k)) * SPREAD_K);
  return hash < h.threshold ? splat(h.dropout_scale) : vf{};
}
INLINE uint32_t row_hash(const Head& h, int64_t i) {
  return mix(h.dropout_hash ^ uint32_t(i) * SPREAD_Q);
}
