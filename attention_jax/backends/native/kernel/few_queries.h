// Few queries over many keys, as in decoding: bound by reading the keys, which are read once.
//
//   for each 64 keys of a part                      keys and values straight from memory
//     for each head whose keys lie in these rows
//       for each TOGETHER of its rows               rows of q, out: first-level cache
//         s = q k^T, four keys at a time
//         scores, mask, maximum, p, sum
//         out = out * 2^(old m - m) + p v
//
// Heads that interleave in memory are done together, so that memory is read in the order in which
// it lies. Keys that no query sees are not read: a cache costs what it holds. The parts, of at
// least 1024 keys, are joined in order; how many depends on S alone.

constexpr int TOGETHER = 4, SUB = 64;
constexpr int AHEAD = 8;  // keys that are prefetched ahead

struct FewMemory {
  float *q, *out, *sum, *top, *s, *tile;
  FewMemory(Arena& a, const Call& c, int64_t heads) {
    const int64_t rows = heads * round_up(c.G * c.T, TOGETHER), W = round_up(c.D, LANES);
    q = a.floats(rows * round_up(c.H, LANES));
    out = a.floats(rows * W);
    sum = a.floats(rows);
    top = a.floats(rows);
    s = a.floats(TOGETHER * BLOCK);
    tile = a.floats(TOGETHER * W);
  }
};

// s[m][j] = q[m] . k[j] for four keys at a time.
template <class X>
INLINE void few_logits(int64_t H, const float* q, const X* k, int64_t ld, int n, float* s) {
  const int64_t padded = round_up(H, LANES), whole = H / LANES * LANES;
  for (int j = 0; j < n; j += 4) {
    const X* key[4];
    for (int i = 0; i < 4; i++) key[i] = k + least(j + i, n - 1) * ld;
    vf sum[TOGETHER * 4];
    for (int i = 0; i < TOGETHER * 4; i++) sum[i] = vf{};
    for (int64_t h = 0; h < padded; h += LANES) {
      vf x[4];
      for (int i = 0; i < 4; i++) {
        x[i] = h < whole ? load(key[i] + h) : load_first(key[i] + h, H - h);
        __builtin_prefetch(key[i] + h + AHEAD * ld);
      }
      for (int m = 0; m < TOGETHER; m++) {
        const vf y = load(q + m * padded + h);
        for (int i = 0; i < 4; i++) sum[m * 4 + i] += y * x[i];
      }
    }
    float logits[TOGETHER * 4];
    for (int i = 0; i < TOGETHER * 4; i += LANES) store(logits + i, sums(sum + i));
    for (int m = 0; m < TOGETHER; m++) memcpy(s + m * BLOCK + j, logits + 4 * m, sizeof(float) * 4);
  }
}

// out[m] += p[m] v. If the result is not finite, again without the values whose probability is 0.
template <class X>
INLINE void few_values(int64_t D, const float* p, const X* v, int64_t ld, int n, float* tile,
                       float* out) {
  const int64_t W = round_up(D, LANES), whole = D / LANES * LANES;
  int64_t d = 0;
  for (int j = 0; j < n; j++)
    for (int64_t at = 0; at < D; at += 64 / sizeof(X))
      __builtin_prefetch(v + (j + AHEAD) * ld + at);
  for (; d + 2 * LANES <= whole; d += 2 * LANES)
    product<TOGETHER, 2, BLOCK, false>(n, p, 1, v + d, ld, tile + d, W);
  for (; d < whole; d += LANES) product<TOGETHER, 1, BLOCK, false>(n, p, 1, v + d, ld, tile + d, W);
  if (d < D)
    for (int m = 0; m < TOGETHER; m++) {
      vf sum = vf{};
      for (int j = 0; j < n; j++) sum += p[m * BLOCK + j] * load_first(v + j * ld + d, D - d);
      store(tile + m * W + d, sum);
    }
  for (int m = 0; m < TOGETHER; m++) {
    float* row = tile + m * W;
    vf zero = vf{};
    for (d = 0; d < W; d += LANES) zero += load(row + d) * 0.0f;
    if (!(horizontal_sum(zero) == 0.0f)) {
      memset(row, 0, sizeof(float) * W);
      for (int j = 0; j < n; j++)
        for (d = 0; d < D && p[m * BLOCK + j] != 0; d++)
          row[d] += p[m * BLOCK + j] * load_one(v + j * ld + d);
    }
    for (d = 0; d < W; d += LANES) store(out + m * W + d, load(out + m * W + d) + load(row + d));
  }
}

template <class X>
static void few_item(const Call& c, const Item& item, char* memory, float* partial) {
  Arena arena(memory);
  const FewMemory x(arena, c, item.last - item.e);
  const int64_t rows = c.G * c.T, padded = round_up(rows, TOGETHER);
  const int64_t HP = round_up(c.H, LANES), W = round_up(c.D, LANES);
  const int64_t all = (item.last - item.e) * padded;
  memset(x.q, 0, sizeof(float) * all * HP);
  memset(x.out, 0, sizeof(float) * all * W);
  for (int64_t i = 0; i < all; i++) x.sum[i] = 0, x.top[i] = NOTHING;
  for (int64_t e = item.e; e < item.last; e++)
    for (int64_t r = 0; r < rows; r++) {
      const Head h = c.head(e, r / c.T);
      const X* from = static_cast<const X*>(h.q) + r % c.T * c.q.row;
      float* to = x.q + ((e - item.e) * padded + r) * HP;
      for (int64_t i = 0; i < c.H; i++) to[i] = load_one(from + i) * (h.scale * LOG2E);
    }
  for (int64_t k0 = item.begin; k0 < item.end; k0 += SUB) {
    const int n = least<int64_t>(SUB, item.end - k0);
    for (int64_t e = item.e; e < item.last; e++) {
      const Head shared = c.head(e, 0);
      const X* k = static_cast<const X*>(shared.k) + k0 * c.k.row;
      const X* v = static_cast<const X*>(shared.v) + k0 * c.v.row;
      for (int64_t r = 0; r < rows; r += TOGETHER) {
        const int64_t at = (e - item.e) * padded + r;
        const int count = least<int64_t>(TOGETHER, rows - r);
        bool started = false;  // the logits are computed if some row sees some key
        bool seen[TOGETHER] = {};
        for (int m = 0; m < count; m++) {
          const int64_t g = (r + m) / c.T, i = (r + m) % c.T;
          const Head h = c.head(e, g);
          const KeyBlock b(h, c.S, k0, n);
          const Strip strip(c, h, b, i, 1, {0, b.units});
          if (!strip.units.end) continue;
          if (!started) few_logits(c.H, x.q + at * HP, k, c.k.row, n, x.s);
          started = seen[m] = true;
          float* s = x.s + m * BLOCK;
          HeadScore scores[MOST_SCORES];
          for (int z = 0; z < c.score_count; z++) scores[z] = c.score(z, e, g);
          for (int u = 0; u < b.units; u++)
            for (int j = u * UNIT; j < (u + 1) * UNIT && !strip.kind[u]; j += LANES)
              store(s + j, splat(MASKED));
          Scored{c, h, scores}.apply(b, strip, s, nullptr);
          for (int j = b.units * UNIT; j < SUB; j++) s[j] = MASKED;
          vf high = splat(MASKED);
          for (int j = 0; j < SUB; j += LANES) high = vmax(high, load(s + j));
          const float old = x.top[at + m], now = most(old, horizontal_max(high));
          vf total = vf{};
          const uint32_t hash = row_hash(h, i);
          for (int j = 0; j < SUB; j += LANES) {
            const vf p = exp2v(load(s + j) - splat(now));
            total += p;
            store(s + j, h.kept == 0 ? p : p * dropout_factor(h, hash, k0 + j));
          }
          const vf shrink = exp2v(splat(old - now));
          x.sum[at + m] = x.sum[at + m] * shrink[0] + horizontal_sum(total);
          x.top[at + m] = now;
          float* out = x.out + (at + m) * W;
          if (now != old)
            for (int64_t d = 0; d < W; d += LANES) store(out + d, load(out + d) * shrink);
        }
        if (!started) continue;
        for (int m = 0; m < TOGETHER; m++)
          if (!seen[m]) memset(x.s + m * BLOCK, 0, sizeof(float) * SUB);
        few_values(c.D, x.s, v, c.v.row, n, x.tile, x.out + at * W);
      }
    }
  }
  for (int64_t e = item.e; e < item.last; e++)
    for (int64_t r = 0; r < rows; r++) {
      const int64_t at = (e - item.e) * padded + r;
      float* to = partial + (e * rows + r) * partial_row(c);
      to[0] = x.top[at];
      to[1] = x.sum[at];
      memcpy(to + 2, x.out + at * W, sizeof(float) * c.D);
    }
}

// The parts of row r of head e, each `distance` floats after the other, become its result.
static void few_join(const Call& c, int64_t e, int64_t r, float* partial, int64_t parts,
                     int64_t distance) {
  float* first = partial + (e * c.G * c.T + r) * partial_row(c);
  float top = NOTHING;
  for (int64_t p = 0; p < parts; p++) top = most(top, first[p * distance]);
  for (int64_t p = 0; p < parts; p++) {
    const float* x = first + p * distance;
    const float shrink = p == 0 && x[0] == top ? 1 : exp2v(splat(x[0] - top))[0];
    for (int64_t d = 1; d < c.D + 2; d++) first[d] = (p ? first[d] : 0) + shrink * x[d];
  }
  finish_row(c, c.head(e, r / c.T), r % c.T, top, first[1], first + 2);
}

static size_t few_bytes(const Call& c, int64_t heads) {
  Arena arena;
  FewMemory(arena, c, heads);
  return arena.used();
}
