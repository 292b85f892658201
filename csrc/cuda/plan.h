// How the CUDA kernels deal their work out. Everything here is a pure function of sizes, strides,
// dtype and pointer alignment: no device is asked, so the order of every sum, and with it every bit
// of a result, is the same on every GPU and in every run, and the plans are tested without one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/view.h"

namespace idap {
namespace cuda {

constexpr int kThreads = 256;   // threads of every block
constexpr int kQuantities = 9;  // doubles a block hands on per channel; see records.cuh

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t clamp(int64_t v, int64_t lo, int64_t hi) { return v < lo ? lo : (v > hi ? hi : v); }

inline int64_t pow2_ceil(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

inline int element_size(DType t) {
  return t == DType::kFloat64 ? 8 : (t == DType::kFloat32 ? 4 : 2);
}

// Exact division of n < 2^31 by a constant: one multiplication, one shift.
struct FastDiv {
  uint32_t divisor = 1, magic = 0, shift = 0;
};

inline FastDiv make_fast_div(int64_t d) {
  FastDiv f;
  f.divisor = static_cast<uint32_t>(d);
  if (d > 1) {
    uint32_t bits = 0;
    while ((int64_t{1} << bits) < d) ++bits;
    f.shift = bits - 1;  // floor(n / d) = (n * ceil(2^(31 + bits) / d)) >> (31 + bits)
    f.magic = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + d - 1) / d);
  }
  return f;
}

// Offsets of the items of a row. An item is what one load takes: one element, or a vector of them.
struct Walk {
  int dims = 0;
  int wide = 0;  // 2^31 items or more: divide in 64 bits
  int64_t items = 1;
  int64_t size[kMaxPositionDims] = {1, 1, 1, 1};
  int64_t stride[kMaxPositionDims] = {0, 0, 0, 0};
  FastDiv div[kMaxPositionDims];
};

inline Walk make_walk(int dims, const int64_t* size, const int64_t* stride, int vec) {
  Walk w;
  for (int i = 0; i < dims; ++i) {
    const bool inner = i == dims - 1;
    const int64_t n = inner ? size[i] / vec : size[i];
    if (n == 1) continue;
    w.size[w.dims] = n;
    w.stride[w.dims++] = inner ? stride[i] * vec : stride[i];
    w.items *= n;
  }
  w.wide = w.items >= (int64_t{1} << 31);
  for (int i = 0; i < w.dims && !w.wide; ++i) w.div[i] = make_fast_div(w.size[i]);
  return w;
}

// ----------------------------------------------------------------- channel_stats, bn_act_stats

enum class Shape : int {
  kRows = 0,     // whole rows (one sample of one channel), each by `lanes` neighbouring threads
  kPieces = 1,   // one piece of one row by the whole block
  kColumns = 2,  // a tile of neighbouring channels, threads across channels and positions
};

struct ChannelPlan {
  Shape shape = Shape::kRows;
  int vec = 1;    // elements per load
  int lanes = 1;  // threads along a row (kRows, kPieces) or along the channels (kColumns)
  int tile = 1;   // channels per block, a power of two
  int64_t tiles = 1;
  int64_t samples_per_block = 1;  // more than one only in kRows
  int64_t sample_blocks = 1;
  int64_t pieces = 1;  // blocks that share a row; more than one only outside kRows
  int64_t piece = 1;   // items (kPieces) or positions (kColumns) of a piece
  int64_t slices = 1;  // blocks that share a channel tile: sample_blocks * pieces
  // The last block of a group of slices adds the group up; the last group of a tile finishes it.
  int64_t group_samples = 1;  // sample blocks per group, when groups hold whole rows
  int64_t group_pieces = 1;   // pieces per group, when a row needs several groups
  int64_t groups_per_row = 1;
  int64_t groups = 1;
  int64_t blocks = 1;
  int64_t tickets = 0;  // uint32 counters: zero before the first launch, left zero by every launch
  int64_t scratch = 0;  // bytes, any content
};

// Whether loads of `vec` elements are aligned wherever they begin: the pointer, the strides between
// runs, and the length of a run along the dimension of stride one. `y`, if any, is what is stored
// at the same offsets.
inline bool loads_aligned(const View& v, const int64_t* strides, int n, int64_t run, int vec,
                          const void* y = nullptr) {
  const uintptr_t pointers = reinterpret_cast<uintptr_t>(v.data) | reinterpret_cast<uintptr_t>(y);
  bool ok = pointers % (vec * element_size(v.dtype)) == 0 && run % vec == 0;
  for (int i = 0; i < n; ++i) ok = ok && strides[i] % vec == 0;
  return ok;
}

// Elements per load: 16 bytes, 8 for halves where 16 do not fit (a row of 14 x 14), else one
// element.
inline int vector_width(const View& v, const int64_t* strides, int n, int64_t run, const void* y) {
  const int size = element_size(v.dtype);
  if (loads_aligned(v, strides, n, run, 16 / size, y)) return 16 / size;
  return size == 2 && loads_aligned(v, strides, n, run, 4, y) ? 4 : 1;
}

// Enough blocks for several waves on the largest GPUs (132 or more multiprocessors, 3 blocks each),
// few enough that adding their records up stays small beside reading the map.
constexpr int64_t kFill = 528;
constexpr int64_t kFillThreads = int64_t{1} << 17;
constexpr int64_t kMaxBlocks = int64_t{1} << 30;

// Also the plan of bn_act_stats, which writes `y` with the strides of v. Wherever the pointers
// allow loads of the same width it is the same plan.
inline bool plan_channel_stats(const View& v, ChannelPlan* out, const void* y = nullptr) {
  ChannelPlan p;
  const int64_t B = v.samples, C = v.channels, S = v.positions();
  if (B < 1 || C < 1 || S < 1) return false;
  const int size = element_size(v.dtype);
  const int64_t inner_stride = v.dims ? v.stride[v.dims - 1] : 0;
  const bool channel_fastest = C > 1 && (v.dims == 0 || v.channel_stride < inner_stride);
  // A thread per row wants many rows, since each loads one element at a time.
  const bool thread_rows = channel_fastest && (S <= 16 || (S <= 64 && B * C >= kFillThreads / 8) ||
                                               (S <= 256 && B * C >= kFillThreads * 4));

  if (channel_fastest && !thread_rows) {
    p.shape = Shape::kColumns;
    int64_t strides[kMaxPositionDims + 1] = {v.sample_stride, 0, 0, 0, 0};
    for (int i = 0; i < v.dims; ++i) strides[i + 1] = v.stride[i];
    // Eight halves a thread would need too many registers: four are taken at a time.
    p.vec = size == 8 ? 2 : 4;
    if (v.channel_stride != 1 || !loads_aligned(v, strides, v.dims + 1, C, p.vec, y)) p.vec = 1;
    // Narrow, since a record costs 72 bytes a channel, but whole sectors of a cache line.
    const int64_t tile = clamp(pow2_ceil(C), p.vec, 32);
    p.lanes = static_cast<int>(tile / p.vec);
    p.tile = static_cast<int>(tile);
    p.tiles = ceil_div(C, tile);
    p.sample_blocks = B;
    const int64_t rows = kThreads / p.lanes;
    const int64_t elements = B * C * S;
    const int64_t fill = elements >> 26 ? 4 * kFill : (elements >> 24 ? 2 * kFill : kFill);
    const int64_t want = clamp(ceil_div(fill, p.tiles * B), 1, ceil_div(S, rows * 4));
    p.piece = ceil_div(S, want);
    p.pieces = ceil_div(S, p.piece);
  } else {
    int64_t strides[kMaxPositionDims + 2] = {v.sample_stride, v.channel_stride, 0, 0, 0, 0};
    for (int i = 0; i + 1 < v.dims; ++i) strides[i + 2] = v.stride[i];
    if (inner_stride == 1) p.vec = vector_width(v, strides, v.dims + 1, v.size[v.dims - 1], y);
    const int64_t items = S / p.vec;
    if (!channel_fastest && ((items >= 256 && B * C * 32 < kFillThreads) || items >> 30)) {
      p.shape = Shape::kPieces;
      p.lanes = 32;
      p.tile = 1;
      p.tiles = C;
      p.sample_blocks = B;
      // 16 items a thread where that already gives every multiprocessor several blocks; less if
      // not.
      const int64_t many = clamp(ceil_div(8 * kFill, B * C), 1, ceil_div(items, kThreads * 16));
      const int64_t some = clamp(ceil_div(kFill, B * C), 1, ceil_div(items, kThreads * 2));
      p.piece = ceil_div(items, many > some ? many : some);
      if (p.piece >> 30)
        p.piece = int64_t{1} << 30;  // the kernel counts items of a piece in an int
      p.pieces = ceil_div(items, p.piece);
    } else {
      p.shape = Shape::kRows;
      // About eight items a thread: few idle threads at the end of a row, few steps to add a row
      // up.
      p.lanes = thread_rows ? 1
                            : static_cast<int>(clamp(pow2_ceil(ceil_div(items, 8)),
                                                     clamp(pow2_ceil(items), 1, 8), 32));
      const int64_t groups = kThreads / p.lanes;
      // A narrow tile, with more samples side by side, leaves fewer records; it still reads about a
      // kilobyte, or 32 neighbouring channels, in one go.
      const int64_t wide = thread_rows ? 32 : pow2_ceil(ceil_div(1024, S * size));
      const int64_t least_tile = groups / pow2_ceil(B);
      p.tile = static_cast<int>(clamp(wide > least_tile ? wide : least_tile, 1, groups));
      if (p.tile > C) p.tile = static_cast<int>(pow2_ceil(C));
      p.tiles = ceil_div(C, p.tile);
      const int64_t together = groups / p.tile;  // samples the block reads side by side
      const int64_t per_row = ceil_div(items, p.lanes) * p.vec;
      const int64_t least = p.tiles * ceil_div(B, together);
      int64_t rounds = clamp(least / kFill, 1, ceil_div(128, per_row));
      const int64_t capped = ceil_div(least, int64_t{1} << 14);
      if (rounds < capped && per_row < 4096) rounds = capped;
      p.samples_per_block = together * rounds < B ? together * rounds : B;
      p.sample_blocks = ceil_div(B, p.samples_per_block);
      p.piece = items;
    }
  }

  p.slices = p.sample_blocks * p.pieces;
  p.group_samples = p.sample_blocks;
  p.group_pieces = p.pieces;
  if (p.slices * p.tile > 8 * kThreads && p.slices > 8) {
    int64_t fan = 1;
    while (fan * fan < p.slices) ++fan;
    if (p.pieces <= fan) {
      p.group_samples = fan / p.pieces;
      p.groups = ceil_div(p.sample_blocks, p.group_samples);
    } else {
      p.group_samples = 1;
      p.group_pieces = ceil_div(p.pieces, ceil_div(p.pieces, fan));
      p.groups_per_row = ceil_div(p.pieces, p.group_pieces);
      p.groups = p.sample_blocks * p.groups_per_row;
    }
  }
  p.blocks = p.tiles * p.slices;
  if (p.blocks > kMaxBlocks) return false;
  p.tickets = p.slices > 1 ? p.tiles * (p.groups + 1) : 0;
  const int64_t records = p.slices + (p.groups > 1 ? p.groups : 0);
  p.scratch = records * p.tiles * p.tile * kQuantities * static_cast<int64_t>(sizeof(double));
  *out = p;
  return true;
}

// ------------------------------------------------------------------------------- pair_stats

constexpr int kPairDims = 6;

// Two tensors of one shape, seen as rows x elements. Row dimensions keep their order, element
// dimensions are sorted and merged where both tensors allow it.
struct PairView {
  const void* x = nullptr;
  const void* y = nullptr;
  DType dtype = DType::kFloat32;
  int row_dims = 0, dims = 0;
  int64_t row_size[kPairDims] = {1, 1, 1, 1, 1, 1};
  int64_t row_x[kPairDims] = {};
  int64_t row_y[kPairDims] = {};
  int64_t size[kPairDims] = {1, 1, 1, 1, 1, 1};
  int64_t stride_x[kPairDims] = {};
  int64_t stride_y[kPairDims] = {};

  static int64_t product(int n, const int64_t* size) {
    int64_t p = 1;
    for (int i = 0; i < n; ++i) p *= size[i];
    return p;
  }
  int64_t rows() const { return product(row_dims, row_size); }
  int64_t elements() const { return product(dims, size); }
};

inline int merge_pairs(int n, bool sort, int64_t* size, int64_t* sx, int64_t* sy) {
  int m = 0;
  for (int i = 0; i < n; ++i) {
    if (size[i] == 1) continue;
    const int64_t s = size[i], a = sx[i], b = sy[i];
    int j = m++;
    for (; sort && j > 0 && (sx[j - 1] < a || (sx[j - 1] == a && sy[j - 1] < b)); --j) {
      size[j] = size[j - 1];
      sx[j] = sx[j - 1];
      sy[j] = sy[j - 1];
    }
    size[j] = s;
    sx[j] = a;
    sy[j] = b;
  }
  int k = 0;
  for (int i = 1; i < m; ++i) {
    if (sx[k] == sx[i] * size[i] && sy[k] == sy[i] * size[i]) {
      size[k] *= size[i];
    } else {
      size[++k] = size[i];
    }
    sx[k] = sx[i];
    sy[k] = sy[i];
  }
  return m == 0 ? 0 : k + 1;
}

// The first `row_dims` of `ndim` dimensions are rows. Returns false when more than
// kPairDims row or element dimensions remain after merging.
inline bool make_pair_view(const void* x, const void* y, DType dtype, int ndim, const int64_t* size,
                           const int64_t* sx, const int64_t* sy, int row_dims, PairView* out) {
  PairView v;
  v.x = x;
  v.y = y;
  v.dtype = dtype;
  if (ndim > kMaxDims || row_dims > ndim || row_dims < 0) return false;
  int64_t n[kMaxDims], a[kMaxDims], b[kMaxDims];
  for (int i = 0; i < ndim; ++i) {
    n[i] = size[i];
    a[i] = sx[i];
    b[i] = sy[i];
  }
  v.row_dims = merge_pairs(row_dims, false, n, a, b);
  v.dims = merge_pairs(ndim - row_dims, true, n + row_dims, a + row_dims, b + row_dims);
  if (v.row_dims > kPairDims || v.dims > kPairDims) return false;
  for (int i = 0; i < v.row_dims; ++i) {
    v.row_size[i] = n[i];
    v.row_x[i] = a[i];
    v.row_y[i] = b[i];
  }
  for (int i = 0; i < v.dims; ++i) {
    v.size[i] = n[row_dims + i];
    v.stride_x[i] = a[row_dims + i];
    v.stride_y[i] = b[row_dims + i];
  }
  *out = v;
  return true;
}

struct PairPlan {
  int vec = 1;
  int lanes = 32;      // threads along a row; kThreads when the block works on one piece of a row
  int64_t pieces = 1;  // blocks that share a row
  int64_t piece = 1;   // items of a piece
  int64_t blocks = 1;
  int64_t tickets = 0;
  int64_t scratch = 0;
};

inline bool plan_pair_stats(const PairView& v, PairPlan* out) {
  PairPlan p;
  const int64_t rows = v.rows(), n = v.elements();
  if (rows < 1 || n < 1) return false;
  if (v.dims && v.stride_x[v.dims - 1] == 1 && v.stride_y[v.dims - 1] == 1) {
    const int size = element_size(v.dtype);
    const int vec = 16 / size;
    bool ok = reinterpret_cast<uintptr_t>(v.x) % 16 == 0 &&
              reinterpret_cast<uintptr_t>(v.y) % 16 == 0 && v.size[v.dims - 1] % vec == 0;
    for (int i = 0; i + 1 < v.dims; ++i)
      ok = ok && v.stride_x[i] % vec == 0 && v.stride_y[i] % vec == 0;
    for (int i = 0; i < v.row_dims; ++i) ok = ok && v.row_x[i] % vec == 0 && v.row_y[i] % vec == 0;
    if (ok) p.vec = vec;
  }
  const int64_t items = n / p.vec;
  p.piece = items;
  if (items >= 512 && rows * 32 < kFillThreads) {
    p.lanes = kThreads;
    const int64_t many = clamp(ceil_div(8 * kFill, rows), 1, ceil_div(items, kThreads * 16));
    const int64_t some = clamp(ceil_div(kFill, rows), 1, ceil_div(items, kThreads * 2));
    p.piece = ceil_div(items, many > some ? many : some);
    p.pieces = ceil_div(items, p.piece);
    p.blocks = rows * p.pieces;
  } else {
    p.lanes =
        static_cast<int>(clamp(pow2_ceil(ceil_div(items, 8)), clamp(pow2_ceil(items), 1, 8), 32));
    p.blocks = ceil_div(rows, kThreads / p.lanes);
  }
  if (p.blocks > kMaxBlocks) return false;
  if (p.pieces > 1) {
    p.tickets = rows;
    p.scratch = rows * p.pieces * kPairRows * static_cast<int64_t>(sizeof(double));
  }
  *out = p;
  return true;
}

// ----------------------------------------------------------------------------- filter_norms

// One layer's weight, seen as filters x elements. dtype, vec and lanes are small on purpose: the
// whole table travels as a kernel parameter.
struct FilterEntry {
  const void* data = nullptr;
  double* out = nullptr;  // device, one double per filter
  int64_t filters = 0, filter_stride = 0;
  int64_t size[3] = {1, 1, 1};
  int64_t stride[3] = {0, 0, 0};
  int32_t first_block = 0;  // of this entry in the launch
  int8_t dtype = 0, vec = 1, dims = 0, block_per_filter = 0;
};

// Builds an entry; first_block and out are the caller's. False: more than three dimensions remain.
inline bool make_filter_entry(const void* data, DType dtype, int ndim, const int64_t* size,
                              const int64_t* stride, int dim, FilterEntry* out) {
  View v;
  if (!make_view(data, dtype, ndim, size, stride, dim, -1, &v) || v.dims > 3) return false;
  FilterEntry e;
  e.data = data;
  e.dtype = static_cast<int8_t>(dtype);
  e.filters = v.channels;
  e.filter_stride = v.channel_stride;
  e.dims = static_cast<int8_t>(v.dims);
  if (v.dims && v.stride[v.dims - 1] == 1) {
    int64_t strides[kMaxPositionDims] = {v.channel_stride, 0, 0, 0};
    for (int i = 0; i + 1 < v.dims; ++i) strides[i + 1] = v.stride[i];
    const int vec = 16 / element_size(dtype);
    if (loads_aligned(v, strides, v.dims, v.size[v.dims - 1], vec))
      e.vec = static_cast<int8_t>(vec);
  }
  for (int i = 0; i < v.dims; ++i) {
    e.size[i] = i == v.dims - 1 ? v.size[i] / e.vec : v.size[i];
    e.stride[i] = i == v.dims - 1 ? v.stride[i] * e.vec : v.stride[i];
  }
  e.block_per_filter = v.positions() / e.vec >= 4096;
  *out = e;
  return true;
}

inline int64_t filter_blocks(const FilterEntry& e) {
  return e.block_per_filter ? e.filters : ceil_div(e.filters, kThreads / 32);
}

}  // namespace cuda
}  // namespace idap
