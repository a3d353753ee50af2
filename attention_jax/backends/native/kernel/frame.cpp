// Sizes, axes and dtypes are checked before a kernel runs, so that it cannot read or write outside
// its arrays. The entries of arrays need no checks, because no address depends on them; except
// those of the table of units, which are indices into the bits and are all checked.
#include "frame.h"

#include <algorithm>

namespace attention {
namespace {

constexpr int64_t MAX_SIZE = int64_t(1) << 30;  // of a length, width or number of heads

void require(bool holds, const std::string& message) {
  if (!holds) throw InvalidArgument("attention: " + message);
}

struct Numbers {
  const int64_t* data;
  int64_t size;
};

Numbers attribute(const ffi::CallFrame* frame, const char* name) {
  const ffi::Attributes& all = frame->attributes;
  for (int64_t i = 0; i < all.count; i++) {
    if (std::string(all.names[i]->text, all.names[i]->length) != name) continue;
    require(all.types[i] == ffi::ARRAY_ATTRIBUTE, std::string(name) + " must be an array");
    const auto* array = static_cast<const ffi::Array*>(all.values[i]);
    require(array->dtype == ffi::S64, std::string(name) + " must hold int64");
    return {static_cast<const int64_t*>(array->data), int64_t(array->size)};
  }
  throw InvalidArgument(std::string("attention: there is no attribute ") + name);
}

int64_t itemsize(ffi::DataType dtype) { return dtype == ffi::F16 || dtype == ffi::BF16 ? 2 : 4; }

// The vmapped axes of the call. A group axis is one that key and value lack: its query heads share
// a key-value head. In the forward pass, an axis along which positions of the keys differ is not
// one: the keys are a pool, from which each example reads few.
struct Levels {
  std::vector<int64_t> size;
  std::vector<bool> group;
  int64_t E = 1, G = 1;
};

class Reader {
 public:
  Reader(const ffi::CallFrame* frame, bool backward) : frame_(frame) {
    const Numbers sizes = attribute(frame, "levels");
    require(sizes.size >= 1 && sizes.data[0] == sizes.size - 1 && sizes.size <= 64,
            "levels must hold their number and then their sizes");
    for (int64_t l = 1; l < sizes.size; l++) {
      require(sizes.data[l] >= 0 && sizes.data[l] <= MAX_SIZE, "a level has a wrong size");
      levels_.size.push_back(sizes.data[l]);
    }
    levels_.group.assign(levels_.size.size(), true);
    read_rows("arguments", frame->arguments);
    read_rows("results", frame->results);
    for (const Entry& x : entries_)
      if (x.role == Role::key || x.role == Role::value || (x.role == Role::positions && !backward))
        for (size_t l = 0; l < levels_.size.size(); l++)
          if (x.axes[l] >= 0) levels_.group[l] = false;
    for (size_t l = 0; l < levels_.size.size(); l++) {
      int64_t& count = levels_.group[l] ? levels_.G : levels_.E;
      count *= levels_.size[l];
      require(count <= MAX_SIZE, "too many heads");
    }
  }

  struct Entry {
    Role role;
    int64_t score;  // for a d_score: the index of the score
    bool result;
    const int64_t* axes;
    const ffi::Buffer* buffer;
  };
  const std::vector<Entry>& entries() const { return entries_; }
  const Levels& levels() const { return levels_; }

  // The view of an array, after checking its dtype and its shape without the mapped axes:
  // `rows x columns`, `columns` alone if `rows` is -1, or a scalar if both are -1. A size of 0
  // accepts any size.
  View view(const Entry& x, ffi::DataType dtype, int64_t rows, int64_t columns) const {
    const ffi::Buffer& b = *x.buffer;
    const std::string name = "array " + std::to_string(int64_t(x.role));
    require(b.dtype == dtype, name + " has a wrong dtype");
    std::vector<int64_t> stride(b.rank);
    int64_t size = 1;
    for (int64_t a = b.rank - 1; a >= 0; a--) {
      require(b.dims[a] >= 0 && b.dims[a] <= MAX_SIZE, name + " has a wrong size");
      stride[a] = size;
      size *= b.dims[a];
      require(size <= MAX_SIZE << 20, name + " is too large");
    }
    View v;
    v.data = static_cast<char*>(b.data);
    v.itemsize = itemsize(dtype);
    v.size = size;
    std::vector<bool> mapped(b.rank, false);
    std::vector<int64_t> step(levels_.size.size(), 0);
    for (size_t l = 0; l < levels_.size.size(); l++) {
      const int64_t axis = x.axes[l];
      if (axis == -1) {
        if (levels_.size[l] > 1) (levels_.group[l] ? v.shared_in_group : v.shared) = true;
        continue;
      }
      require(axis >= 0 && axis < b.rank && !mapped[axis] && b.dims[axis] == levels_.size[l],
              name + " has wrong mapped axes");
      mapped[axis] = true;
      step[l] = stride[axis];
    }
    std::vector<int64_t> core;
    for (int64_t a = 0; a < b.rank; a++)
      if (!mapped[a]) core.push_back(a);
    const size_t rank = rows >= 0 ? 2 : columns >= 0 ? 1 : 0;
    require(core.size() == rank, name + " has a wrong rank");
    v.rows = v.columns = 1;
    if (rank >= 1) {
      v.columns = b.dims[core.back()];
      require(stride[core.back()] == 1 || v.columns == 1,
              name + ": its last axis must not be mapped");
      require(columns == 0 || v.columns == columns, name + " has a wrong width");
    }
    if (rank == 2) {
      v.rows = b.dims[core[0]];
      v.row = stride[core[0]];
      require(rows == 0 || v.rows == rows, name + " has a wrong length");
    }
    v.outer = offsets(step, false);
    v.group = offsets(step, true);
    return v;
  }

 private:
  void read_rows(const char* name, const ffi::Buffers& buffers) {
    const Numbers rows = attribute(frame_, name);
    const int64_t width = 2 + int64_t(levels_.size.size());
    require(rows.size == buffers.count * width, std::string(name) + " must have a row per array");
    for (int64_t i = 0; i < buffers.count; i++) {
      require(buffers.types[i] == ffi::BUFFER, "arguments must be arrays");
      const int64_t* row = rows.data + i * width;
      require(row[0] >= 0 && row[0] < int64_t(Role::count), "an array has an unknown role");
      entries_.push_back({Role(row[0]), row[1], name[0] == 'r', row + 2,
                          static_cast<const ffi::Buffer*>(buffers.buffers[i])});
    }
  }

  // The offset of every combination of indices along the group levels, or along the other levels;
  // the last level varies fastest.
  std::vector<int64_t> offsets(const std::vector<int64_t>& step, bool group) const {
    std::vector<int64_t> all = {0};
    for (size_t l = 0; l < step.size(); l++) {
      if (levels_.group[l] != group) continue;
      std::vector<int64_t> next;
      next.reserve(all.size() * levels_.size[l]);
      for (const int64_t base : all)
        for (int64_t i = 0; i < levels_.size[l]; i++) next.push_back(base + i * step[l]);
      all = std::move(next);
    }
    return all;
  }

  const ffi::CallFrame* frame_;
  Levels levels_;
  std::vector<Entry> entries_;
};

// Checks that no entry of the table points outside the bits.
void check_table(const Call& c) {
  const int64_t rows = (c.T + 47) / 48;
  for (const int64_t e : c.kinds.outer)
    for (const int64_t g : c.kinds.group) {
      const auto* table = reinterpret_cast<const int32_t*>(c.kinds.data) + e + g;
      for (int64_t i = 0; i < rows; i++) {
        const int64_t last = (std::min<int64_t>(48, c.T - i * 48) - 1) * c.bits.row;
        const int64_t room = c.bits ? c.bits.rows * c.bits.row - last : 0;
        for (int64_t j = 0; j < c.units; j++) {
          const int64_t entry = table[i * c.kinds.row + j];
          require(entry >= 0 && (entry < 2 || entry - 2 < room),
                  "an entry of kinds points outside the bits");
        }
      }
    }
}

// Checks that all required arrays are given, and that no two heads write to the same memory, except
// where the kernel orders their writes.
void check_complete(const Call& c, bool backward) {
  const auto check_result = [&](const View& v, bool groups) {
    require(bool(v) && !v.shared, "a result is missing or lacks a mapped axis");
    const bool apart = c.G == 1 || (groups ? v.group.back() > 0 : v.group.back() == 0);
    require(apart || c.E == 0, "a result has wrong mapped axes");
  };
  require(c.q && c.k && c.v && c.scale, "query, key, value or scale is missing");
  require(bool(c.query_ids) == bool(c.key_ids), "ids must be given for both queries and keys");
  const bool dropout = bool(c.seed);
  for (const View* v : {&c.threshold, &c.keep_probability, &c.example, &c.head_number})
    require(bool(*v) == dropout, "an argument of dropout is missing");
  for (const View* v : {&c.out, &c.m, &c.log_l}) check_result(*v, true);
  if (!backward) return;
  require(c.dout && c.dlse, "the cotangents are missing");
  check_result(c.dq, true);
  check_result(c.dk, false);
  check_result(c.dv, false);
  if (c.dscale) check_result(c.dscale, true);
  if (c.dsink) check_result(c.dsink, true);
  require(!c.dsink || c.sink, "d_sink needs a sink");
}

}  // namespace

bool answer_metadata_query(const ffi::CallFrame* frame) {
  ffi::Extension* extension = frame->extension;
  if (!extension || extension->type != ffi::METADATA_EXTENSION) return false;
  ffi::Metadata* metadata = reinterpret_cast<ffi::MetadataExtension*>(extension)->metadata;
  metadata->version.major = ffi::API_MAJOR;
  metadata->version.minor = ffi::API_MINOR;
  metadata->traits = 0;
  return true;
}

ffi::Error* error(const ffi::CallFrame* frame, ffi::Code code, const char* message) {
  ffi::ErrorCreate arguments = {sizeof(ffi::ErrorCreate), nullptr, message, code};
  return frame->api->error_create(&arguments);
}

Call read_call(const ffi::CallFrame* frame, bool backward, Options* options) {
  const Numbers given = attribute(frame, "options");
  require(given.size == 3, "options must be block_k, instructions and few_queries");
  *options = {given.data[0], given.data[1], given.data[2]};
  const Reader reader(frame, backward);
  Call c;
  c.E = reader.levels().E;
  c.G = reader.levels().G;
  ffi::DataType dtype = ffi::F32;
  // Query, key and value give the sizes by which the other arrays are checked.
  for (const auto& x : reader.entries()) {
    if (x.result || (x.role != Role::query && x.role != Role::key && x.role != Role::value))
      continue;
    const View v = reader.view(x, x.buffer->dtype, 0, 0);
    if (x.role == Role::query) c.T = v.rows, c.H = v.columns, dtype = x.buffer->dtype;
    if (x.role == Role::key) c.S = v.rows;
    if (x.role == Role::value) c.D = v.columns;
  }
  for (const int64_t n : {c.T, c.S, c.H, c.D})
    require(n >= 1 && n <= MAX_SIZE, "query, key or value is missing or empty");
  require(dtype == ffi::F32 || dtype == ffi::BF16 || dtype == ffi::F16,
          "query must be float32, bfloat16 or float16");
  c.type = dtype == ffi::F32 ? Type::f32 : dtype == ffi::BF16 ? Type::bf16 : Type::f16;
  c.units = (c.S + 31) / 32;

  const auto assign = [](View* where, const View& v) {
    require(!*where, "a role is given twice");
    *where = v;
  };
  for (const auto& x : reader.entries()) {
    const auto read = [&](ffi::DataType type, int64_t rows, int64_t columns) {
      return reader.view(x, type, rows, columns);
    };
    const bool written = x.role == Role::out || x.role == Role::m || x.role == Role::log_l
                             ? !backward
                             : x.role >= Role::d_query;
    require(x.result == written, "an argument is given as a result, or a result as an argument");
    switch (x.role) {
      case Role::query: assign(&c.q, read(dtype, c.T, c.H)); break;
      case Role::key: assign(&c.k, read(dtype, c.S, c.H)); break;
      case Role::value: assign(&c.v, read(dtype, c.S, c.D)); break;
      case Role::scale: assign(&c.scale, read(ffi::F32, -1, -1)); break;
      case Role::sink: assign(&c.sink, read(ffi::F32, -1, -1)); break;
      case Role::bounds: assign(&c.bounds, read(ffi::S32, c.T, 2)); break;
      case Role::positions: assign(&c.positions, read(ffi::S32, -1, c.S)); break;
      case Role::query_ids: assign(&c.query_ids, read(ffi::S32, -1, c.T)); break;
      case Role::key_ids: assign(&c.key_ids, read(ffi::S32, -1, c.S)); break;
      case Role::kinds: assign(&c.kinds, read(ffi::S32, (c.T + 47) / 48, c.units)); break;
      case Role::bits: assign(&c.bits, read(ffi::U32, 0, 0)); break;
      case Role::seed: assign(&c.seed, read(ffi::U32, -1, -1)); break;
      case Role::threshold: assign(&c.threshold, read(ffi::U32, -1, -1)); break;
      case Role::keep_probability: assign(&c.keep_probability, read(ffi::F32, -1, -1)); break;
      case Role::example: assign(&c.example, read(ffi::S32, -1, -1)); break;
      case Role::head: assign(&c.head_number, read(ffi::S32, -1, -1)); break;
      case Role::softcap:
      case Role::bias:
      case Role::diagonal: {
        require(c.score_count < MAX_SCORES, "too many scores");
        Score& score = c.scores[c.score_count++];
        if (x.role == Role::softcap) {
          score.kind = ScoreKind::softcap;
          score.array = read(ffi::F32, -1, -1);
          c.softcap_count++;
        } else if (x.role == Role::diagonal) {
          score.kind = ScoreKind::diagonal;
          score.array = read(ffi::F32, -1, c.T + c.S - 1);
        } else {
          score.kind = ScoreKind::bias;
          score.array = read(ffi::F32, 0, 0);
          require((score.array.rows == c.T || score.array.rows == 1) &&
                      (score.array.columns == c.S || score.array.columns == 1),
                  "a bias has a wrong shape");
        }
        break;
      }
      case Role::out: assign(&c.out, read(ffi::F32, c.T, c.D)); break;
      case Role::m: assign(&c.m, read(ffi::F32, -1, c.T)); break;
      case Role::log_l: assign(&c.log_l, read(ffi::F32, -1, c.T)); break;
      case Role::d_out: assign(&c.dout, read(ffi::F32, c.T, c.D)); break;
      case Role::d_lse: assign(&c.dlse, read(ffi::F32, -1, c.T)); break;
      case Role::d_query: assign(&c.dq, read(ffi::F32, c.T, c.H)); break;
      case Role::d_key: assign(&c.dk, read(ffi::F32, c.S, c.H)); break;
      case Role::d_value: assign(&c.dv, read(ffi::F32, c.S, c.D)); break;
      case Role::d_scale: assign(&c.dscale, read(ffi::F32, -1, -1)); break;
      case Role::d_sink: assign(&c.dsink, read(ffi::F32, -1, -1)); break;
      case Role::d_score: {
        require(x.score >= 0 && x.score < c.score_count, "d_score has no matching score");
        Score& score = c.scores[x.score];
        require(score.kind != ScoreKind::softcap, "d_score of a softcap is not supported");
        const bool bias = score.kind == ScoreKind::bias;
        assign(&score.gradient, read(ffi::F32, bias ? score.array.rows : -1, score.array.columns));
        break;
      }
      case Role::count: break;
    }
  }
  check_complete(c, backward);
  if (c.kinds) check_table(c);
  return c;
}

Head Call::head(int64_t e, int64_t g) const {
  Head h = {};
  h.q = q.raw(e, g), h.k = k.raw(e, g), h.v = v.raw(e, g);
  h.out = out.at<float>(e, g), h.m = m.at<float>(e, g), h.log_l = log_l.at<float>(e, g);
  h.dout = dout.at<float>(e, g), h.dlse = dlse.at<float>(e, g);
  h.dq = dq.at<float>(e, g), h.dk = dk.at<float>(e, g), h.dv = dv.at<float>(e, g);
  h.dscale = dscale.at<float>(e, g), h.dsink = dsink.at<float>(e, g);
  h.scale = *scale.at<float>(e, g);
  h.sink = sink ? *sink.at<float>(e, g) : 0;
  h.bounds = bounds.at<int32_t>(e, g), h.positions = positions.at<int32_t>(e, g);
  h.query_ids = query_ids.at<int32_t>(e, g), h.key_ids = key_ids.at<int32_t>(e, g);
  h.kinds = kinds.at<int32_t>(e, g), h.bits = bits.at<uint32_t>(e, g);
  if (seed) {
    const uint32_t b = *example.at<uint32_t>(e, g), n = *head_number.at<uint32_t>(e, g);
    h.dropout_hash = mix(mix(*seed.at<uint32_t>(e, g) ^ b * SPREAD_B) ^ n * SPREAD_N);
    h.threshold = *threshold.at<uint32_t>(e, g);
    h.dropout_scale = 1 / *keep_probability.at<float>(e, g);
  }
  return h;
}

HeadScore Call::score(int which, int64_t e, int64_t g) const {
  const Score& x = scores[which];
  const int64_t row = x.array.rows > 1 ? x.array.row : 0;
  const int64_t column = x.kind == ScoreKind::diagonal || x.array.columns > 1 ? 1 : 0;
  return {x.kind,
          x.array.at<float>(e, g),
          x.gradient.at<float>(e, g),
          nullptr,
          row,
          x.gradient && x.array.rows > 1 ? x.gradient.row : 0,
          column};
}

}  // namespace attention
