// Which pairs are visible. Keys are classified in units of 32: empty, full or partial.
//
// Query i attends to key j if the key's position lies in [lo, hi) of the query, both have the same
// id, and the bit of the pair is set; each of the three conditions is optional. Positions are
// 0 .. S - 1 unless given. Comparing the ranges of lo, hi and id over some rows with the ranges of
// position and id over a unit shows whether the unit is empty or full for these rows. So causal
// masks, windows, lengths, chunks, segments and KV caches need no T x S array. For other masks, a
// table classifies tiles of 48 x 32 pairs, and each row of a partial tile has a word of bits.

constexpr int UNIT = 32;                 // keys per unit
constexpr int UNITS = BLOCK / UNIT;      // units per block of keys
constexpr int TABLE_ROWS = 48;           // queries per entry of the table
constexpr int FULL = 1, FIRST_BITS = 2;  // table entries: 0 empty, 1 full, or 2 + index of bits

constexpr float MASKED = -1e30f;      // a masked logit
constexpr float NO_MAXIMUM = -5e29f;  // the initial maximum: above MASKED, below any logit

// A block of keys: positions and ids, -1 beyond the last key, and their range in each unit.
struct KeyBlock {
  int64_t k0;
  int units;
  int32_t position[BLOCK], id[BLOCK];
  struct Range {
    int32_t min_position, max_position, min_id, max_id;
    bool padded;  // some key is masked for all queries
  } range[UNITS];

  const int32_t *positions, *ids;  // where they are from

  KeyBlock(const Head& h, int64_t S, int64_t first, int64_t count) { fill(h, S, first, count); }

  // Reads the positions and ids of a head, unless they are those that it has.
  void of(const Call& c, int64_t e, int64_t g, int64_t count) {
    if (positions == c.positions.at<int32_t>(e, g) && ids == c.key_ids.at<int32_t>(e, g)) return;
    fill(c.head(e, g), c.S, k0, count);
  }

  void fill(const Head& h, int64_t S, int64_t first, int64_t count) {
    k0 = first, positions = h.positions, ids = h.key_ids;
    const int have = minimum(count, S - first);
    units = (have + UNIT - 1) / UNIT;
    for (int j = 0; j < have; j++) position[j] = positions ? positions[first + j] : first + j;
    for (int j = 0; j < have; j++) id[j] = ids ? ids[first + j] : 0;
    for (int j = have; j < units * UNIT; j++) position[j] = id[j] = -1;
    for (int u = 0; u < units; u++) {
      Range r = {INT32_MAX, INT32_MIN, INT32_MAX, INT32_MIN, false};
      for (int j = u * UNIT; j < (u + 1) * UNIT; j++) {  // without branches: as vectors
        const bool masked = (position[j] < 0) | (id[j] < 0);
        r.padded |= masked;
        r.min_position = minimum(r.min_position, masked ? INT32_MAX : position[j]);
        r.max_position = maximum(r.max_position, masked ? INT32_MIN : position[j]);
        r.min_id = minimum(r.min_id, masked ? INT32_MAX : id[j]);
        r.max_id = maximum(r.max_id, masked ? INT32_MIN : id[j]);
      }
      range[u] = r;
    }
  }
};

// Whether some key in [begin, end) is not masked for all queries.
INLINE bool any_key(const Head& h, int64_t begin, int64_t end) {
  bool any = !h.positions && !h.key_ids;
  for (int64_t j = begin; j < end && !any; j += UNIT) {
    int32_t mask = INT32_MIN;
    for (int64_t i = j; i < minimum<int64_t>(j + UNIT, end); i++)
      mask &= (h.positions ? h.positions[i] : 0) | (h.key_ids ? h.key_ids[i] : 0);
    any = mask >= 0;  // the sign of some key is not set
  }
  return any;
}

struct Row {
  int32_t lo, hi, id;  // attends to keys with lo <= position < hi and this id
};
INLINE Row row_of(const Head& h, int64_t i) {
  Row r = {0, INT32_MAX, 0};
  if (h.bounds) r.lo = maximum(0, h.bounds[2 * i]), r.hi = h.bounds[2 * i + 1];
  if (h.query_ids) r.id = h.query_ids[i];
  if (r.id < 0 || r.lo >= r.hi) r = {INT32_MAX, INT32_MIN, -1};
  return r;
}

// The smallest and largest bounds and ids of some rows.
struct RowExtremes {
  int32_t min_lo = INT32_MAX, max_lo = INT32_MIN, min_hi = INT32_MAX, max_hi = INT32_MIN;
  int32_t min_id = INT32_MAX, max_id = INT32_MIN;

  RowExtremes(const Head& h, int64_t begin, int64_t end) {
    if (!h.bounds && !h.query_ids) {
      min_lo = max_lo = min_id = max_id = 0;
      min_hi = max_hi = INT32_MAX;
      return;
    }
    for (int64_t i = begin; i < end; i++) {
      const Row r = row_of(h, i);
      min_lo = minimum(min_lo, r.lo), max_lo = maximum(max_lo, r.lo);
      min_hi = minimum(min_hi, r.hi), max_hi = maximum(max_hi, r.hi);
      if (r.id < 0) continue;
      min_id = minimum(min_id, r.id), max_id = maximum(max_id, r.id);
    }
  }
};

// 0 for an empty unit, FULL for a full one, else FIRST_BITS.
INLINE int kind_of(const RowExtremes& q, const KeyBlock::Range& k) {
  const bool some = k.max_position >= q.min_lo && k.min_position < q.max_hi &&
                    k.max_id >= q.min_id && k.min_id <= q.max_id;
  if (!some) return 0;
  const bool every = !k.padded && k.min_position >= q.max_lo && k.max_position < q.min_hi &&
                     k.min_id == k.max_id && q.min_id == q.max_id && k.min_id == q.min_id;
  return every ? FULL : FIRST_BITS;
}
INLINE int table_entry(const Call& c, const Head& h, int64_t i, int64_t k) {
  return h.kinds ? h.kinds[i / TABLE_ROWS * c.units + k / UNIT] : FULL;
}

// Units [first, end) of a block, from the first to the last with a visible pair; empty if end is 0.
struct UnitRange {
  int first = UNITS, end = 0;
  void include(UnitRange other) {
    first = minimum(first, other.first);
    end = maximum(end, other.end);
  }
};
static UnitRange visited_units(const Call& c, const Head& h, const KeyBlock& b,
                               const RowExtremes& rows, int64_t begin, int64_t end) {
  UnitRange found;
  for (int u = 0; u < b.units; u++) {
    if (!kind_of(rows, b.range[u])) continue;
    bool some = !h.kinds;
    for (int64_t i = begin; i < end && !some; i = i / TABLE_ROWS * TABLE_ROWS + TABLE_ROWS)
      some = table_entry(c, h, i, b.k0 + u * UNIT) != 0;
    if (some) found.include({u, u + 1});
  }
  return found;
}

// The visible units of a block for a strip of rows, which lie within one row of the table.
struct Strip {
  int64_t i0;
  int rows;
  UnitRange units;
  int8_t kind[UNITS];  // empty, FULL, or FIRST_BITS for partial

  Strip(const Call& c, const Head& h, const KeyBlock& b, int64_t first, int count, UnitRange within)
      : i0(first), rows(count) {
    const RowExtremes extremes(h, i0, i0 + rows);
    for (int u = within.first; u < within.end; u++) {
      const int entry = table_entry(c, h, i0, b.k0 + u * UNIT);
      kind[u] = entry ? kind_of(extremes, b.range[u]) : 0;
      if (kind[u] == FULL && entry != FULL) kind[u] = FIRST_BITS;
      if (kind[u]) units.include({u, u + 1});
    }
  }
  int begin() const { return units.first * UNIT; }
  int end() const { return units.end * UNIT; }
};

// Sets the logits of masked pairs to MASKED; column 0 of s [rows x ld] is the block's first key.
INLINE void mask_strip(const Call& c, const Head& h, const KeyBlock& b, const Strip& strip,
                       float* s, int64_t ld) {
  const vi lane = lanes();
  for (int u = strip.units.first; u < strip.units.end; u++) {
    if (strip.kind[u] == FULL) continue;
    const int entry = table_entry(c, h, strip.i0, b.k0 + u * UNIT);
    const uint32_t* words = entry >= FIRST_BITS ? h.bits + (entry - FIRST_BITS) : nullptr;
    for (int m = 0; m < strip.rows; m++) {
      float* at = s + m * ld + u * UNIT;
      const Row row = strip.kind[u] ? row_of(h, strip.i0 + m) : Row{INT32_MAX, INT32_MIN, -1};
      const uint32_t word = words ? words[(strip.i0 + m) % TABLE_ROWS * c.bits.row] : 0xffffffffu;
      for (int j = 0; j < UNIT; j += LANES) {
        const vi position = load(b.position + u * UNIT + j), id = load(b.id + u * UNIT + j);
        const vi bit = reinterpret_cast<vi>(splat(word >> j)) >> lane & 1;
        const vi visible = (position >= row.lo) & (position < row.hi) & (id == row.id) & (bit != 0);
        store(at + j, visible ? load(at + j) : splat(MASKED));
      }
    }
  }
}
