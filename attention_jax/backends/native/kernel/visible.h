// Which pairs are visible, decided in units of 32 keys: empty, full, or partial.
//
// Query i sees key j where the key's position lies in [lo, hi) of the query, both have the same id,
// and the bit of the pair is set; each of the three may be missing. Positions are 0 .. S - 1 unless
// given. From the least and largest lo, hi and id of some rows, and position and id of a unit, a
// few comparisons tell whether a unit is empty or full for these rows. So causal masks, windows,
// lengths, chunks, documents and caches need no array of T x S. For any other mask a table says so
// for 48 x 32 pairs, and the bits of a partial unit are one word per row.

constexpr int UNIT = 32;                 // keys whose visibility is decided at once
constexpr int UNITS = BLOCK / UNIT;      // in a block of keys
constexpr int TABLE_ROWS = 48;           // queries per entry of the table
constexpr int FULL = 1, FIRST_BITS = 2;  // table entries: 0 empty, full, or 2 + where the bits are

constexpr float MASKED = -1e30f;   // a masked logit
constexpr float NOTHING = -5e29f;  // the maximum of no logits

// A block of keys: positions and ids, -1 beyond the last key, and their ranges in each unit.
struct KeyBlock {
  int64_t k0;
  int units;
  int32_t position[BLOCK], id[BLOCK];
  struct Range {
    int32_t least_position, most_position, least_id, most_id;
    bool padded;  // some key is masked for all queries
  } range[UNITS];

  KeyBlock(const Head& h, int64_t S, int64_t first, int64_t count) : k0(first) {
    const int have = least(count, S - first);
    units = (have + UNIT - 1) / UNIT;
    for (int j = 0; j < units * UNIT; j++) {
      const bool inside = j < have;
      position[j] = !inside ? -1 : h.positions ? h.positions[first + j] : first + j;
      id[j] = !inside ? -1 : h.key_ids ? h.key_ids[first + j] : 0;
    }
    for (int u = 0; u < units; u++) {
      Range r = {INT32_MAX, INT32_MIN, INT32_MAX, INT32_MIN, false};
      for (int j = u * UNIT; j < (u + 1) * UNIT; j++) {
        const bool masked = position[j] < 0 || id[j] < 0;
        r.padded |= masked;
        if (masked) continue;
        r.least_position = least(r.least_position, position[j]);
        r.most_position = most(r.most_position, position[j]);
        r.least_id = least(r.least_id, id[j]);
        r.most_id = most(r.most_id, id[j]);
      }
      range[u] = r;
    }
  }
};

struct Row {
  int32_t lo, hi, id;  // sees keys with lo <= position < hi and this id
};
INLINE Row row_of(const Head& h, int64_t i) {
  Row r = {0, INT32_MAX, 0};
  if (h.bounds) r.lo = most(0, h.bounds[2 * i]), r.hi = h.bounds[2 * i + 1];
  if (h.query_ids) r.id = h.query_ids[i];
  if (r.id < 0 || r.lo >= r.hi) r = {INT32_MAX, INT32_MIN, -1};
  return r;
}

// The extremes of some rows.
struct Rows {
  int32_t least_lo = INT32_MAX, most_lo = INT32_MIN, least_hi = INT32_MAX, most_hi = INT32_MIN;
  int32_t least_id = INT32_MAX, most_id = INT32_MIN;

  Rows(const Head& h, int64_t begin, int64_t end) {
    if (!h.bounds && !h.query_ids) {
      least_lo = most_lo = least_id = most_id = 0;
      least_hi = most_hi = INT32_MAX;
      return;
    }
    for (int64_t i = begin; i < end; i++) {
      const Row r = row_of(h, i);
      least_lo = least(least_lo, r.lo), most_lo = most(most_lo, r.lo);
      least_hi = least(least_hi, r.hi), most_hi = most(most_hi, r.hi);
      if (r.id < 0) continue;
      least_id = least(least_id, r.id), most_id = most(most_id, r.id);
    }
  }
};

// 0 for an empty unit, FULL for a full one, else FIRST_BITS.
INLINE int kind_of(const Rows& q, const KeyBlock::Range& k) {
  const bool some = k.most_position >= q.least_lo && k.least_position < q.most_hi &&
                    k.most_id >= q.least_id && k.least_id <= q.most_id;
  if (!some) return 0;
  const bool every = !k.padded && k.least_position >= q.most_lo && k.most_position < q.least_hi &&
                     k.least_id == k.most_id && q.least_id == q.most_id && k.least_id == q.least_id;
  return every ? FULL : FIRST_BITS;
}
INLINE int table_entry(const Call& c, const Head& h, int64_t i, int64_t k) {
  return h.kinds ? h.kinds[i / TABLE_ROWS * c.units + k / UNIT] : FULL;
}

// The units [first, end) of a block of which some row sees a key; none if end is 0.
struct UnitRange {
  int first = UNITS, end = 0;
  void include(UnitRange other) {
    first = least(first, other.first);
    end = most(end, other.end);
  }
};
static UnitRange visited_units(const Call& c, const Head& h, const KeyBlock& b, const Rows& rows,
                               int64_t begin, int64_t end) {
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

// What a strip of rows sees of a block. Its rows lie within one row of the table.
struct Strip {
  int64_t i0;
  int rows;
  UnitRange units;
  int8_t kind[UNITS];  // empty, FULL, or FIRST_BITS for partial

  Strip(const Call& c, const Head& h, const KeyBlock& b, int64_t first, int count, UnitRange within)
      : i0(first), rows(count) {
    const Rows extremes(h, i0, i0 + rows);
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

// Logits of masked pairs become MASKED; s [rows x ld], column 0 is the block's first key.
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
        const vi seen = (position >= row.lo) & (position < row.hi) & (id == row.id) & (bit != 0);
        store(at + j, seen ? load(at + j) : splat(MASKED));
      }
    }
  }
}
