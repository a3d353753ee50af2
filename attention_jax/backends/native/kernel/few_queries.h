// The forward pass for few queries and many keys, as in decoding. Its time is that of reading keys
// and values, so it reads them once and in place.
//
//   item: a chunk of the keys of heads that interleave in memory
//   for each SUB_BLOCK of its keys
//     read keys and values of all heads, as they lie in memory    L2 cache
//     for each head
//       for each ROW_TILE of its rows                       L1 cache: rows of q and out
//         s = q k^T, KEY_TILE at a time
//         scores, mask, maximum, p, sum
//         out = out * 2^(old maximum - maximum) + p v
//
// Heads that interleave in memory belong to one item, so that memory is read sequentially. Examples
// that share a pool of pages have positions of their own, so each is an item of its own. Keys that
// no query attends to are not read, so the cost of a KV cache follows the tokens that it holds.
// Chunks have at least 1024 keys. Their number depends on S alone, and their partial results are
// merged in order, so results do not depend on the number of threads.

constexpr int ROW_TILE = 4, SUB_BLOCK = 64;
// The registers hold ROW_TILE x KEY_TILE sums, KEY_TILE keys and one query.
constexpr int KEY_TILE = LANES < 16 ? 2 : 4;

struct FewBuffers {
  float *q, *out, *sum, *row_max, *s, *tile;
  FewBuffers(Arena& a, const Call& c, int64_t heads) {
    const int64_t rows = heads * round_up(c.G * c.T, ROW_TILE), W = round_up(c.D, LANES);
    q = a.floats(rows * round_up(c.H, LANES));
    out = a.floats(rows * W);
    sum = a.floats(rows);
    row_max = a.floats(rows);
    s = a.floats(ROW_TILE * BLOCK);
    tile = a.floats(ROW_TILE * W);
  }
};

// s[m][j] = q[m] . k[j] for KEY_TILE keys at a time.
template <class X>
INLINE void few_logits(const Call& c, const float* q, const X* k, int n, float* s) {
  const int64_t H = c.H, padded = round_up(H, LANES), whole = H / LANES * LANES;
  for (int j = 0; j < n; j += KEY_TILE) {
    const X* key[KEY_TILE];
    for (int i = 0; i < KEY_TILE; i++) key[i] = k + minimum(j + i, n - 1) * c.k.row;
    vf sum[ROW_TILE * KEY_TILE];
    for (int i = 0; i < ROW_TILE * KEY_TILE; i++) sum[i] = vf{};
    for (int64_t h = 0; h < padded; h += LANES) {
      vf x[KEY_TILE];
      for (int i = 0; i < KEY_TILE; i++)
        x[i] = h < whole ? load(key[i] + h) : load_first(key[i] + h, H - h);
      for (int m = 0; m < ROW_TILE; m++) {
        const vf y = load(q + m * padded + h);
        for (int i = 0; i < KEY_TILE; i++) sum[m * KEY_TILE + i] += y * x[i];
      }
    }
    float logits[ROW_TILE * KEY_TILE];
    for (int i = 0; i < ROW_TILE * KEY_TILE; i += LANES) store(logits + i, sums(sum + i));
    for (int m = 0; m < ROW_TILE; m++)
      memcpy(s + m * BLOCK + j, logits + KEY_TILE * m, sizeof(float) * KEY_TILE);
  }
}

// out[m] += p[m] v. If the sum is not finite, it is computed again from the values whose
// probability is not 0, since 0 * NaN is NaN.
template <class X>
INLINE void few_values(int64_t D, const float* p, const X* v, int64_t ld, int n, float* tile,
                       float* out) {
  const int64_t W = round_up(D, LANES), whole = D / LANES * LANES;
  int64_t d = 0;
  for (; d + 2 * LANES <= whole; d += 2 * LANES)
    product<ROW_TILE, 2, BLOCK, false>(n, p, 1, v + d, ld, tile + d, W);
  for (; d < whole; d += LANES) product<ROW_TILE, 1, BLOCK, false>(n, p, 1, v + d, ld, tile + d, W);
  if (d < D)
    for (int m = 0; m < ROW_TILE; m++) {
      vf sum = vf{};
      for (int j = 0; j < n; j++) sum += p[m * BLOCK + j] * load_first(v + j * ld + d, D - d);
      store(tile + m * W + d, sum);
    }
  for (int m = 0; m < ROW_TILE; m++) {
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

// Reads a byte of every line of n rows in the order of memory, which the processor's own prefetcher
// follows, further ahead than prefetch instructions could be: the heads are then computed one by
// one, at strides that it does not follow.
template <class X>
INLINE void read_lines(const X* x, int64_t ld, int64_t width, int n) {
  int sum = 0;
  for (int j = 0; j < n; j++) {
    const char* row = reinterpret_cast<const char*>(x + j * ld);
    for (int64_t i = 0; i < width * int64_t(sizeof(X)); i += 64) sum += row[i];
  }
  asm volatile("" ::"r"(sum));  // otherwise compilers remove the loads
}

// The width of a row of all heads of an item, each of which has `width` entries.
static int64_t joint_width(const View& x, const Item& item, int64_t width) {
  int64_t most = 0;
  for (int64_t e = item.e; e < item.last; e++) most = maximum(most, x.outer[e] - x.outer[item.e]);
  return minimum(most, x.row) + width;
}

template <class X>
static void few_item(const Call& c, const Item& item, char* memory, float* partial) {
  Arena arena(memory);
  const FewBuffers x(arena, c, item.last - item.e);
  const int64_t rows = c.G * c.T, padded = round_up(rows, ROW_TILE);
  const int64_t HP = round_up(c.H, LANES), W = round_up(c.D, LANES);
  const int64_t all = (item.last - item.e) * padded;
  const int64_t k_width = joint_width(c.k, item, c.H), v_width = joint_width(c.v, item, c.D);
  bool any = false;                          // in a pool, most keys are of other examples
  for (int64_t g = 0; g < c.G && !any; g++)  // the same for all e of an item
    any = any_key(c.head(item.e, g), item.begin, item.end);
  if (!any) {
    for (int64_t r = 0; r < (item.last - item.e) * rows; r++) {
      float* to = partial + (item.e * rows + r) * partial_size(c);
      memset(to, 0, sizeof(float) * partial_size(c));
      to[0] = NO_MAXIMUM;
    }
    return;
  }
  memset(x.q, 0, sizeof(float) * all * HP);
  memset(x.out, 0, sizeof(float) * all * W);
  for (int64_t i = 0; i < all; i++) x.sum[i] = 0, x.row_max[i] = NO_MAXIMUM;
  for (int64_t e = item.e; e < item.last; e++)
    for (int64_t r = 0; r < rows; r++) {
      const Head h = c.head(e, r / c.T);
      const X* from = static_cast<const X*>(h.q) + r % c.T * c.q.row;
      float* to = x.q + ((e - item.e) * padded + r) * HP;
      for (int64_t i = 0; i < c.H; i++) to[i] = load_one(from + i) * (h.scale * LOG2E);
    }
  for (int64_t k0 = item.begin; k0 < item.end; k0 += SUB_BLOCK) {
    const int n = minimum<int64_t>(SUB_BLOCK, item.end - k0);
    KeyBlock b(c.head(item.e, 0), c.S, k0, n);
    bool lines_read = false;
    for (int64_t e = item.e; e < item.last; e++) {
      const Head shared = c.head(e, 0);
      const X* k = static_cast<const X*>(shared.k) + k0 * c.k.row;
      const X* v = static_cast<const X*>(shared.v) + k0 * c.v.row;
      for (int64_t r = 0; r < rows; r += ROW_TILE) {
        const int64_t at = (e - item.e) * padded + r;
        const int count = minimum<int64_t>(ROW_TILE, rows - r);
        UnitRange visited;  // by any of these rows; only logits of these units are computed
        for (int m = 0; m < count; m++) {
          const int64_t g = (r + m) / c.T, i = (r + m) % c.T;
          b.of(c, e, g, n);
          visited.include(Strip(c, c.head(e, g), b, i, 1, {0, b.units}).units);
        }
        if (!visited.end) continue;
        const int first = visited.first * UNIT, keys = minimum(visited.end * UNIT, n) - first;
        const X *some_k = k + first * c.k.row, *some_v = v + first * c.v.row;
        if (!lines_read) {
          const Head lowest = c.head(item.e, 0);
          const int64_t begin = k0 + first;
          read_lines(static_cast<const X*>(lowest.k) + begin * c.k.row, c.k.row, k_width, keys);
          read_lines(static_cast<const X*>(lowest.v) + begin * c.v.row, c.v.row, v_width, keys);
          lines_read = true;
        }
        few_logits(c, x.q + at * HP, some_k, keys, x.s + first);
        bool visible[ROW_TILE] = {};
        for (int m = 0; m < count; m++) {
          const int64_t g = (r + m) / c.T, i = (r + m) % c.T;
          const Head h = c.head(e, g);
          b.of(c, e, g, n);
          const Strip strip(c, h, b, i, 1, {0, b.units});
          if (!strip.units.end) continue;
          visible[m] = true;
          float* s = x.s + m * BLOCK;
          HeadScore scores[MAX_SCORES];
          for (int z = 0; z < c.score_count; z++) scores[z] = c.score(z, e, g);
          for (int u = 0; u < b.units; u++)
            for (int j = u * UNIT; j < (u + 1) * UNIT && !strip.kind[u]; j += LANES)
              store(s + j, splat(MASKED));
          Scored{c, h, scores}.apply(b, strip, s, nullptr);
          for (int j = b.units * UNIT; j < SUB_BLOCK; j++) s[j] = MASKED;
          vf high = splat(MASKED);
          for (int j = 0; j < SUB_BLOCK; j += LANES) high = vmax(high, load(s + j));
          const float old_max = x.row_max[at + m], new_max = maximum(old_max, horizontal_max(high));
          vf total = vf{};
          const uint32_t hash = row_hash(h, i);
          for (int j = 0; j < SUB_BLOCK; j += LANES) {
            const vf p = exp2v(load(s + j) - splat(new_max));
            total += p;
            store(s + j, h.dropout_scale == 0 ? p : p * dropout_factor(h, hash, k0 + j));
          }
          const vf rescale = exp2v(splat(old_max - new_max));
          x.sum[at + m] = x.sum[at + m] * rescale[0] + horizontal_sum(total);
          x.row_max[at + m] = new_max;
          float* out = x.out + (at + m) * W;
          if (new_max != old_max)
            for (int64_t d = 0; d < W; d += LANES) store(out + d, load(out + d) * rescale);
        }
        for (int m = 0; m < ROW_TILE; m++)
          if (!visible[m]) memset(x.s + m * BLOCK, 0, sizeof(float) * SUB_BLOCK);
        few_values(c.D, x.s + first, some_v, c.v.row, keys, x.tile, x.out + at * W);
      }
    }
  }
  for (int64_t e = item.e; e < item.last; e++)
    for (int64_t r = 0; r < rows; r++) {
      const int64_t at = (e - item.e) * padded + r;
      float* to = partial + (e * rows + r) * partial_size(c);
      to[0] = x.row_max[at];
      to[1] = x.sum[at];
      memcpy(to + 2, x.out + at * W, sizeof(float) * c.D);
    }
}

// Merges the partial results of row r of head e, which lie `stride` floats apart, into its result.
static void few_merge(const Call& c, int64_t e, int64_t r, float* partial, int64_t chunks,
                      int64_t stride) {
  float* first = partial + (e * c.G * c.T + r) * partial_size(c);
  float row_max = NO_MAXIMUM;
  for (int64_t p = 0; p < chunks; p++) row_max = maximum(row_max, first[p * stride]);
  for (int64_t p = 0; p < chunks; p++) {
    const float* x = first + p * stride;
    if (p && x[0] == NO_MAXIMUM && x[1] == 0) continue;  // with a NaN, the sum is NaN
    const float rescale = p == 0 && x[0] == row_max ? 1 : exp2v(splat(x[0] - row_max))[0];
    for (int64_t d = 1; d < c.D + 2; d++) first[d] = (p ? first[d] : 0) + rescale * x[d];
  }
  finish_row(c, c.head(e, r / c.T), r % c.T, row_max, first[1], first + 2);
}

static size_t few_bytes(const Call& c, int64_t heads) {
  Arena arena;
  FewBuffers(arena, c, heads);
  return arena.used();
}
