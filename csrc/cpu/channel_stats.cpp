// channel_stats on the CPU: one read of the map gives all rows of common/accumulator.h. With a
// writer it is bn_act_stats: what was accumulated is normalized and written while it is in cache.
//
// Work is cut into units whose borders depend on the shape alone; each unit fills its own slab of
// partial results, and slabs are merged in a fixed order. So the result has the same bits for any
// number of threads.
//
// Inside a unit, a block of at most a few hundred values per lane is accumulated in the block's
// type (float for float, half and bfloat16), around a shift K taken from the block itself; blocks
// are carried into double. The shift keeps the variance of data far from zero.
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels.h"
#include "simd.h"
#include "writer.h"

namespace idap {
namespace IDAP_ISA {
namespace {

constexpr int kLaneBlock =
    128;  // values a lane takes before it is carried into double (tiles: kTileMax)
constexpr int kTileMax = 256;             // longest row that is transposed rather than reduced
constexpr int64_t kChannelBlock = 256;    // channels of a unit where channels are contiguous
constexpr int64_t kSerialWork = 1 << 18;  // elements below which waking a second thread costs more

// One double per channel of the unit and row.
enum SlabRow {
  sShift,  // K0: deviations below are from it
  sSum,    // sum of y - K0
  sSq,     // sum of (y - K0)^2
  sAbs,
  sActSq,
  sNorm,
  sAbsMeanSq,
  sPositive,
  sMin,
  sMax,
  sSampleSum,  // of the sample in progress: sum of y
  sSampleAbs,  // sum of relu(y) for relu, else of |y|
  sSampleSq,   // sum of act(y)^2
  sSampleMag,  // sum of |act(y)|, only where a sample is one position
  sRows
};

enum class Path { kRow, kTile, kChannel };

struct Plan {
  Path path;
  bool contiguous;  // the vectorised dimension has stride one
  bool single;      // one position per sample: samples are walked as positions
  int64_t channel_block, channel_units, sample_units, position_units;
  // Slabs hold whole vectors: what stands in the lanes past the last channel reaches no result.
  int64_t pitch() const { return (channel_block + kF - 1) / kF * kF; }
  int64_t units() const { return channel_units * sample_units * position_units; }
};

// Any address will do: a prefetch never faults.
IDAP_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into L2

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class A>
Plan make_plan(const View& v) {
  constexpr int64_t lanes = Lanes<A>::n;
  Plan p{};
  const int64_t positions = v.positions();
  const int64_t work = v.samples * v.channels * positions;
  const int64_t want = work < 32768 ? 1 : work < (1 << 20) ? 8 : 32;
  const int64_t inner = v.dims ? v.stride[v.dims - 1] : 0;
  p.single = positions == 1;
  if (p.single || (inner != 1 && v.channel_stride == 1)) {
    p.path = Path::kChannel;
    p.contiguous = v.channel_stride == 1 || v.channels == 1;
    p.channel_block = v.channels < kChannelBlock ? v.channels : kChannelBlock;
  } else {
    p.path = v.dims == 1 && inner == 1 && positions <= kTileMax && v.channels >= lanes ? Path::kTile
                                                                                       : Path::kRow;
    p.contiguous = inner == 1;
    p.channel_block = ceil_div(ceil_div(v.channels, want), lanes) * lanes;
    if (p.path == Path::kRow) p.channel_block = ceil_div(v.channels, want);
  }
  p.channel_units = ceil_div(v.channels, p.channel_block);
  p.sample_units = p.position_units = 1;
  if (p.channel_units < want) {
    const int64_t most = p.single ? ceil_div(v.samples, kLaneBlock) : v.samples;
    const int64_t rest = ceil_div(want, p.channel_units);
    p.sample_units = rest < most ? rest : most;
  }
  const int64_t grain = p.path == Path::kChannel ? kLaneBlock : 32768;
  if (!p.single && p.path != Path::kTile && (p.path == Path::kChannel || v.dims == 1) &&
      2 * p.channel_units * p.sample_units <= want && positions >= 2 * grain) {
    const int64_t rest = ceil_div(want, p.channel_units * v.samples);
    const int64_t most = positions / grain;
    p.sample_units = v.samples;  // a split sample stands alone: its root is taken in the merge
    p.position_units = rest < most ? rest : most;
  }
  return p;
}

template <class A>
struct Acc {
  using V = typename Lanes<A>::V;
  typename Lanes<A>::I positive;
  V k, sum, sq, abs, act_sq, mag, min, max;

  IDAP_INLINE void reset() {
    positive = typename Lanes<A>::I{};
    sum = sq = abs = act_sq = mag = V{};
  }
  IDAP_INLINE void reset_range() {
    min = splat<V>(std::numeric_limits<A>::infinity());
    max = splat<V>(-std::numeric_limits<A>::infinity());
  }
};

template <class A, Activation kAct, bool kMag>
IDAP_INLINE void step(Acc<A>& a, typename Lanes<A>::V v) {
  const auto d = v - a.k;
  a.sum += d;
  a.sq += d * d;
  const auto r = activate<kAct>(v);
  a.abs += kAct == Activation::kRelu ? r : vabs(v);
  a.act_sq += r * r;
  if constexpr (kMag) a.mag += vabs(r);
  a.positive = count_positive(a.positive, v);
  a.min = vmin(v, a.min);
  a.max = vmax(v, a.max);
}

// The same for the lanes in mask alone.
template <class A, Activation kAct>
IDAP_INLINE void step_masked(Acc<A>& a, typename Lanes<A>::V v, typename Lanes<A>::I mask) {
  using V = typename Lanes<A>::V;
  using I = typename Lanes<A>::I;
  const V d = (V)(mask & (I)(v - a.k));
  a.sum += d;
  a.sq += d * d;
  const V r = (V)(mask & (I)activate<kAct>(v));
  const V kept = (V)(mask & (I)v);
  a.abs += kAct == Activation::kRelu ? r : vabs(kept);
  a.act_sq += r * r;
  a.positive = count_positive(a.positive, kept);
  a.min =
      vmin((V)((mask & (I)v) | (~mask & (I)splat<V>(std::numeric_limits<A>::infinity()))), a.min);
  a.max =
      vmax((V)((mask & (I)v) | (~mask & (I)splat<V>(-std::numeric_limits<A>::infinity()))), a.max);
}

template <class A>
IDAP_INLINE typename Lanes<A>::I lane_index() {
  typename Lanes<A>::I i{};
  for (int l = 0; l < Lanes<A>::n; ++l) i[l] = l;
  return i;
}

// bfloat16 under relu, two values to a 32-bit lane: the low halves and the high halves are widened
// by a shift and a mask, and minima, maxima and signs are taken from the packed bits.
template <class T, Activation kAct>
constexpr bool kPaired = std::is_same_v<T, bf16> && kAct == Activation::kRelu;

struct PairAcc {
  vf k[2], sum[2], sq[2], abs[2], act_sq[2];
  vi16 positive, signed_min, signed_max;
  vu16 unsigned_max;

  IDAP_INLINE void reset() {
    for (int i = 0; i < 2; ++i) sum[i] = sq[i] = abs[i] = act_sq[i] = vf{};
    positive = vi16{};
    signed_min = vi16{} + (int16_t)0x7fff;
    signed_max = vi16{} + (int16_t)-0x8000;
    unsigned_max = vu16{};
  }
};

template <class T>
IDAP_INLINE vu32 load_bits(const T* p) {
  vu32 w;
  std::memcpy(&w, p, sizeof w);
  return w;
}
IDAP_INLINE vf low_half(vu32 w) { return (vf)(w << 16); }
IDAP_INLINE vf high_half(vu32 w) { return (vf)(w & 0xffff0000u); }

IDAP_INLINE void step_pair(PairAcc& a, vu32 w) {
  const vf v[2] = {low_half(w), high_half(w)};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const vf d = v[i] - a.k[i], r = activate<Activation::kRelu>(v[i]);
    a.sum[i] += d;
    a.sq[i] += d * d;
    a.abs[i] += r;
    a.act_sq[i] += r * r;
  }
  a.positive = count_positive_bf16(a.positive, (vu16)w);
  a.signed_min = vmin((vi16)w, a.signed_min);
  a.signed_max = vmax((vi16)w, a.signed_max);
  a.unsigned_max = vmax((vu16)w, a.unsigned_max);
}

// The bits are sign and magnitude. Read as signed, positive numbers are in order and negative ones
// in reverse; read as unsigned, negative ones lie above and the largest magnitude is on top.
IDAP_INLINE vu32 packed_max(const PairAcc& a) {
  return (vu32)(a.signed_max >= 0 ? a.signed_max : a.signed_min);
}
IDAP_INLINE vu32 packed_min(const PairAcc& a) {
  return (vu32)((vi16)a.unsigned_max < 0 ? (vi16)a.unsigned_max : a.signed_min);
}

// Adds both halves to an accumulator of the same shift, lane by lane. At least one step was taken.
IDAP_INLINE void fold(const PairAcc& p, Acc<float>& a) {
  a.sum += p.sum[0] + p.sum[1];
  a.sq += p.sq[0] + p.sq[1];
  a.abs += p.abs[0] + p.abs[1];
  a.act_sq += p.act_sq[0] + p.act_sq[1];
  a.positive += (vi32)((vu32)p.positive & 0xffffu) + (vi32)((vu32)p.positive >> 16);
  a.min = vmin(vmin(low_half(packed_min(p)), a.min), vmin(high_half(packed_min(p)), a.min));
  a.max = vmax(vmax(low_half(packed_max(p)), a.max), vmax(high_half(packed_max(p)), a.max));
}

// Gives each half an accumulator of its own: lanes 2i and 2i + 1 of the data become neighbours.
IDAP_INLINE void separate(const PairAcc& p, Acc<float>* a) {
  auto zip = [](const vf* v, vf& low, vf& high) {
    low = Zip<vf, kF>::lo(v[0], v[1]);
    high = Zip<vf, kF>::hi(v[0], v[1]);
  };
  zip(p.k, a[0].k, a[1].k);
  zip(p.sum, a[0].sum, a[1].sum);
  zip(p.sq, a[0].sq, a[1].sq);
  zip(p.abs, a[0].abs, a[1].abs);
  zip(p.act_sq, a[0].act_sq, a[1].act_sq);
  const vu32 mn = packed_min(p), mx = packed_max(p);
  const vf mins[2] = {low_half(mn), high_half(mn)}, maxs[2] = {low_half(mx), high_half(mx)};
  zip(mins, a[0].min, a[1].min);
  zip(maxs, a[0].max, a[1].max);
  const vf counts[2] = {(vf)((vu32)p.positive & 0xffffu), (vf)((vu32)p.positive >> 16)};
  vf low, high;
  zip(counts, low, high);
  a[0].positive = (vi32)low;
  a[1].positive = (vi32)high;
}

struct Slab {
  double* data;
  int64_t width;         // channels
  int64_t pitch;         // channels, rounded up to whole vectors
  int64_t first;         // which of the map's channels is the first one here
  const Writer* writer;  // nullptr: the map is only read
  double* row(int r) const { return data + r * pitch; }
  vd load_row(int r, int64_t c) const { return load(row(r) + c); }
  void store_row(int r, int64_t c, vd v) const { std::memcpy(row(r) + c, &v, sizeof v); }
  void add_row(int r, int64_t c, vd v) const { store_row(r, c, load_row(r, c) + v); }
};

// Adds a finished sample of channels c ... to the slab. abs is sum relu(y) for relu, else sum |y|.
template <Activation kAct>
IDAP_INLINE void close_sample(const Slab& slab, int64_t c, vd sum, vd abs, vd act_sq,
                              double positions) {
  vd total = abs;
  if constexpr (kAct == Activation::kRelu) {
    // sum|y| = 2 sum relu(y) - sum y: both terms are at most sum|y|, so nothing cancels.
    total = vmax(2.0 * abs - sum, splat<vd>(0.0));  // NaN, where +inf and -inf met, gives 0 ...
    const vi64 infinite = (vi64)(abs == abs) & (vi64)(sum - sum != vd{});
    total = (vd)((infinite & (vi64)splat<vd>(std::numeric_limits<double>::infinity())) |
                 (~infinite & (vi64)total));  // ... which is set right here,
    const vi64 nan = (vi64)(abs != abs);      // and NaN data stays NaN
    total = (vd)((nan & (vi64)abs) | (~nan & (vi64)total));
  }
  const vd mean = total / positions;
  slab.add_row(sAbs, c, total);
  slab.add_row(sActSq, c, act_sq);
  slab.add_row(sNorm, c, vsqrt(act_sq));
  slab.add_row(sAbsMeanSq, c, mean * mean);
}

// Carries the block sums of channels c ... around the shift k into the slab, whose shift is K0:
// sum(y - K0) = s + n d and sum((y - K0)^2) = q + 2 d s + n d^2 with d = k - K0. Lanes outside
// [begin, end) are dropped. With kClosed the block is a whole sample.
template <class A, Activation kAct, bool kMag, bool kClosed>
void carry_lanes(const Slab& slab, int64_t c, int begin, int end, int64_t n, const Acc<A>& a) {
  constexpr int lanes = Lanes<A>::n;
  const double infinity = std::numeric_limits<double>::infinity();
  vi64 index{};
  for (int l = 0; l < kD; ++l) index[l] = l;
#pragma GCC unroll 2
  for (int h = 0; h < lanes / kD; ++h) {
    const int64_t at = c + h * kD;
    const vi64 mask = (vi64)(index + h * kD >= begin) & (vi64)(index + h * kD < end);
    auto keep = [&](vd v) { return (vd)(mask & (vi64)v); };
    auto keep_or = [&](vd v, double other) {
      return (vd)((mask & (vi64)v) | (~mask & (vi64)splat<vd>(other)));
    };
    const vd count = keep(splat<vd>(static_cast<double>(n)));
    const vd k = widen_half(a.k, h), sum = keep(widen_half(a.sum, h));
    const vd d = k - slab.load_row(sShift, at);
    slab.add_row(sSum, at, sum + count * d);
    slab.add_row(sSq, at, keep(widen_half(a.sq, h)) + 2.0 * d * sum + count * d * d);
    slab.add_row(sPositive, at, keep(widen_half(a.positive, h)));
    slab.store_row(sMin, at,
                   vmin(keep_or(widen_half(a.min, h), infinity), slab.load_row(sMin, at)));
    slab.store_row(sMax, at,
                   vmax(keep_or(widen_half(a.max, h), -infinity), slab.load_row(sMax, at)));
    const vd total = sum + count * k, abs = keep(widen_half(a.abs, h)),
             act_sq = keep(widen_half(a.act_sq, h));
    if constexpr (kClosed) {
      close_sample<kAct>(slab, at, total, abs, act_sq, static_cast<double>(n));
    } else {
      slab.add_row(sSampleSum, at, total);
      slab.add_row(sSampleAbs, at, abs);
      slab.add_row(sSampleSq, at, act_sq);
      if constexpr (kMag) slab.add_row(sSampleMag, at, keep(widen_half(a.mag, h)));
    }
  }
}

// Closes the sample in progress of every channel of the slab.
template <Activation kAct>
void end_sample(const Slab& slab, double positions) {
  for (int64_t c = 0; c < slab.width; c += kD) {
    close_sample<kAct>(slab, c, slab.load_row(sSampleSum, c), slab.load_row(sSampleAbs, c),
                       slab.load_row(sSampleSq, c), positions);
    slab.store_row(sSampleSum, c, vd{});
    slab.store_row(sSampleAbs, c, vd{});
    slab.store_row(sSampleSq, c, vd{});
  }
}

// Closes a unit in which every position was a sample of its own.
template <Activation kAct>
void end_single(const Slab& slab, double n) {
  constexpr bool in_abs = kAct == Activation::kRelu || kAct == Activation::kIdentity;
  for (int64_t c = 0; c < slab.width; c += kD) {
    const vd k = slab.load_row(sShift, c);
    // sqrt(act(y)^2) = |act(y)|, and (mean |y|)^2 = y^2
    slab.store_row(sNorm, c, slab.load_row(in_abs ? sSampleAbs : sSampleMag, c));
    slab.store_row(sAbsMeanSq, c,
                   slab.load_row(sSq, c) + 2.0 * k * slab.load_row(sSum, c) + n * k * k);
    const vd norm = slab.load_row(sNorm, c), square = slab.load_row(sAbsMeanSq, c);
    close_sample<kAct>(slab, c, slab.load_row(sSampleSum, c), slab.load_row(sSampleAbs, c),
                       slab.load_row(sSampleSq, c), 1.0);
    slab.store_row(sNorm, c, norm);
    // Infinities met in the sum of squares: sum |y| has what they leave, infinity or NaN.
    const vi64 clean = (vi64)(square == square);
    slab.store_row(sAbsMeanSq, c,
                   (vd)((clean & (vi64)square) | (~clean & (vi64)slab.load_row(sAbs, c))));
  }
}

template <class A>
IDAP_INLINE typename Lanes<A>::V finite_or_zero(typename Lanes<A>::V v) {
  using V = typename Lanes<A>::V;
  using I = typename Lanes<A>::I;
  return (V)((I)(v - v == V{}) & (I)v);
}

// ------------------------------------------------------------------ rows: positions contiguous
template <class T, Activation kAct, bool kContiguous>
void row(const T* p, int64_t stride, int64_t n, const Slab& slab, int64_t c) {
  using A = typename AccOf<T>::type;
  using V = typename Lanes<A>::V;
  using I = typename Lanes<A>::I;
  constexpr int lanes = Lanes<A>::n;
  Acc<A> a;
  a.reset_range();
  const I index = lane_index<A>();
  for (int64_t begin = 0; begin < n; begin += kLaneBlock * lanes) {
    const int64_t end = begin + kLaneBlock * lanes < n ? begin + kLaneBlock * lanes : n;
    const int64_t full = begin + (end - begin) / lanes * lanes;
    const int rest = static_cast<int>(end - full);
    auto at = [&](int64_t i, int count) {
      if constexpr (kContiguous) return count == lanes ? load(p + i) : load_partial(p + i, count);
      return load_strided(p + i * stride, stride, count);
    };
    const int first = end - begin < lanes ? rest : lanes;
    A k = static_cast<A>(sum_lanes<A>(at(begin, first)) / first);
    if (!(k - k == A(0))) k = A(0);
    a.k = splat<V>(k);
    a.reset();
    int64_t i = begin;
    if constexpr (kContiguous && kPaired<T, kAct>) {
      if (i + 2 * lanes <= full) {
        PairAcc pair;
        pair.reset();
        pair.k[0] = pair.k[1] = a.k;
        for (; i + 2 * lanes <= full; i += 2 * lanes) step_pair(pair, load_bits(p + i));
        fold(pair, a);
      }
    }
    for (; i < full; i += lanes) step<A, kAct, false>(a, at(i, lanes));
    if (rest) {
      if (kContiguous && end >= lanes)  // the last full vector; its head was already counted
        step_masked<A, kAct>(a, at(end - lanes, lanes), (I)(index >= lanes - rest));
      else
        step_masked<A, kAct>(a, at(full, rest), (I)(index < rest));
    }
    const double count = static_cast<double>(end - begin), sum = sum_lanes<A>(a.sum);
    const double d = k - slab.row(sShift)[c];
    slab.row(sSum)[c] += sum + count * d;
    slab.row(sSq)[c] += sum_lanes<A>(a.sq) + 2.0 * d * sum + count * d * d;
    slab.row(sPositive)[c] += static_cast<double>(sum_counts<A>(a.positive));
    slab.row(sSampleSum)[c] += sum + count * k;
    slab.row(sSampleAbs)[c] += sum_lanes<A>(a.abs);
    slab.row(sSampleSq)[c] += sum_lanes<A>(a.act_sq);
    if (slab.writer)
      slab.writer->rows(*slab.writer, p + begin * stride, 0, stride, end - begin, slab.first + c,
                        1);
  }
  double mn = slab.row(sMin)[c], mx = slab.row(sMax)[c];
  for (int l = 0; l < lanes; ++l) {
    mn = a.min[l] < mn ? a.min[l] : mn;
    mx = a.max[l] > mx ? a.max[l] : mx;
  }
  slab.row(sMin)[c] = mn;
  slab.row(sMax)[c] = mx;
}

// Offset of position i (in the merged order), in elements.
int64_t position_offset(const View& v, int64_t i) {
  int64_t offset = 0;
  for (int d = v.dims - 1; d >= 0; --d) {
    offset += i % v.size[d] * v.stride[d];
    i /= v.size[d];
  }
  return offset;
}

template <class T, Activation kAct, bool kContiguous>
void rows_unit(const View& v, const Slab& slab, int64_t c0, int64_t b0, int64_t b1, int64_t p0,
               int64_t p1) {
  const int64_t inner = v.dims ? v.size[v.dims - 1] : 1;
  const int64_t stride = v.dims ? v.stride[v.dims - 1] : 0;
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t c = 0; c < slab.width; ++c) {
      const T* base =
          static_cast<const T*>(v.data) + b * v.sample_stride + (c0 + c) * v.channel_stride;
      if (v.dims <= 1) {
        row<T, kAct, kContiguous>(base + p0 * stride, stride, p1 - p0, slab, c);
      } else {  // never split: the unit holds whole samples
        for (int64_t i = 0; i < p1; i += inner)
          row<T, kAct, kContiguous>(base + position_offset(v, i), stride, inner, slab, c);
      }
    }
    end_sample<kAct>(slab, static_cast<double>(p1 - p0));
  }
}

// ------------------------------------------------------- tiles: short rows, a channel per lane
// The rows of a tile are as many streams as there are lanes, more than hardware prefetching
// follows, but together they are one piece of memory: the next piece is asked for line by line.
template <class T, Activation kAct>
void tile(const T* base, int64_t channel_stride, int n, const Slab& slab, int64_t c) {
  using A = typename AccOf<T>::type;
  using V = typename Lanes<A>::V;
  constexpr int lanes = Lanes<A>::n;
  Acc<A> a;
  a.reset();
  a.reset_range();
  V rows[lanes], columns[lanes];
  if (n < lanes) a.k = finite_or_zero<A>(load_strided(base, channel_stride, lanes));
  // Four columns of the first fetch, so that an outlier in one of them is diluted.
  auto shift = [&](auto value) {
    V sum{};
    for (int i = 0; i < lanes; i += lanes / 4 > 0 ? lanes / 4 : 1) sum += value(columns[i]);
    return finite_or_zero<A>(sum * static_cast<A>(lanes < 4 ? 1.0 / lanes : 0.25));
  };
  const char* next = reinterpret_cast<const char*>(base + lanes * channel_stride);
  auto fetch = [&](int j) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      rows[i] = load(base + i * channel_stride + j);
      if ((i * lanes * static_cast<int>(sizeof(T))) % kLine == 0)
        prefetch(next + i * lanes * sizeof(T));
    }
    next += lanes * lanes * sizeof(T);
    transpose<A>(rows, columns);
  };
  int j = 0;
  if constexpr (kPaired<T, kAct>) {
    if (n >= 2 * lanes) {
      PairAcc pair;
      pair.reset();
      for (; j + 2 * lanes <= n; j += 2 * lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          rows[i] = (vf)load_bits(base + i * channel_stride + j);
          prefetch(next + i * 2 * lanes * sizeof(T));
        }
        next += 2 * lanes * lanes * sizeof(T);
        transpose<A>(rows, columns);
        if (j == 0) a.k = pair.k[0] = pair.k[1] = shift([](vf v) { return low_half((vu32)v); });
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) step_pair(pair, (vu32)columns[i]);
      }
      fold(pair, a);
    }
  }
  for (; j + lanes <= n; j += lanes) {
    fetch(j);
    if (j == 0) a.k = shift([](V v) { return v; });
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) step<A, kAct, false>(a, columns[i]);
  }
  if (n - j > 3 && n >= lanes) {
    fetch(n - lanes);
    for (int i = j - (n - lanes); i < lanes; ++i) step<A, kAct, false>(a, columns[i]);
  } else {
    for (; j < n; ++j) step<A, kAct, false>(a, load_strided(base + j, channel_stride, lanes));
  }
  carry_lanes<A, kAct, false, true>(slab, c, 0, lanes, n, a);
  if (slab.writer)
    slab.writer->rows(*slab.writer, base, channel_stride, 1, n, slab.first + c, lanes);
}

template <class T, Activation kAct>
void tiles_unit(const View& v, const Slab& slab, int64_t c0, int64_t b0, int64_t b1) {
  constexpr int lanes = Lanes<typename AccOf<T>::type>::n;
  const int n = static_cast<int>(v.positions());
  const int64_t whole = slab.width / lanes * lanes;
  // The channels left over, fewer than a vector, go row by row in a slab of their own.
  const Slab rest{slab.data + whole, slab.width - whole, slab.pitch, slab.first + whole,
                  slab.writer};
  for (int64_t b = b0; b < b1; ++b) {
    const T* base = static_cast<const T*>(v.data) + b * v.sample_stride + c0 * v.channel_stride;
    for (int64_t c = 0; c < whole; c += lanes)
      tile<T, kAct>(base + c * v.channel_stride, v.channel_stride, n, slab, c);
    if (rest.width == 0) continue;
    for (int64_t c = 0; c < rest.width; ++c)
      row<T, kAct, true>(base + (whole + c) * v.channel_stride, 1, n, rest, c);
    end_sample<kAct>(rest, n);
  }
}

// ------------------------------------------------------------- channels contiguous, lane by lane
// kVectors vectors of channels at once, over n positions at offsets[i]. Rows lie far apart, so what
// is read after this call, at `next` and the same offsets, is asked for meanwhile. Of a vector that
// is not kWhole only `valid` elements are there. Lanes outside [begin, end) are not carried.
template <class T, Activation kAct, bool kContiguous, bool kMag, bool kClosed, bool kWhole,
          int kVectors>
void channels(const T* base, const T* next, const int64_t* offsets, int n, int64_t stride,
              int valid, int begin, int end, const Slab& slab, int64_t c) {
  using A = typename AccOf<T>::type;
  constexpr int lanes = Lanes<A>::n;
  Acc<A> a[kVectors];
  auto at = [&](int i, int g) {
    const T* p = base + offsets[i] + (kContiguous ? g * lanes : g * lanes * stride);
    if constexpr (!kContiguous) return load_strided(p, stride, valid);
    if constexpr (kContiguous && kWhole) return load(p);
    if constexpr (kContiguous && !kWhole) return load_partial(p, valid);
  };
#pragma GCC unroll 2
  for (int g = 0; g < kVectors; ++g) {
    a[g].reset();
    a[g].reset_range();
    // Four places, so that an outlier in one of them is diluted.
    a[g].k = finite_or_zero<A>(((at(0, g) + at(n / 4, g)) + (at(n / 2, g) + at(3 * n / 4, g))) *
                               static_cast<A>(0.25));
  }
  for (int i = 0; i < n; ++i) {
    if constexpr (kContiguous && kWhole) {
#pragma GCC unroll 2
      for (int g = 0; g < kVectors * lanes * static_cast<int>(sizeof(T)); g += kLine)
        prefetch(reinterpret_cast<const char*>(next + offsets[i]) + g);
    }
#pragma GCC unroll 2
    for (int g = 0; g < kVectors; ++g) step<A, kAct, kMag>(a[g], at(i, g));
  }
#pragma GCC unroll 2
  for (int g = 0; g < kVectors; ++g)
    carry_lanes<A, kAct, kMag, kClosed>(slab, c + g * lanes, begin, end, n, a[g]);
}

// The same for two vectors of bfloat16 channels under relu.
template <Activation kAct, bool kClosed>
void channels_paired(const bf16* base, const bf16* next, const int64_t* offsets, int n,
                     const Slab& slab, int64_t c) {
  PairAcc pair;
  pair.reset();
  vf low{}, high{};
  for (int i = 0; i < 4; ++i) {  // four places, so that an outlier in one of them is diluted
    const vu32 w = load_bits(base + offsets[i * n / 4]);
    low += low_half(w);
    high += high_half(w);
  }
  pair.k[0] = finite_or_zero<float>(low * 0.25f);
  pair.k[1] = finite_or_zero<float>(high * 0.25f);
  for (int i = 0; i < n; ++i) {
    prefetch(next + offsets[i]);
    step_pair(pair, load_bits(base + offsets[i]));
  }
  Acc<float> a[2];
  separate(pair, a);
#pragma GCC unroll 2
  for (int g = 0; g < 2; ++g)
    carry_lanes<float, kAct, false, kClosed>(slab, c + g * kF, 0, kF, n, a[g]);
}

template <class T, Activation kAct, bool kContiguous, bool kMag, bool kClosed>
void channels_block(const T* base, const T* next_block, const int64_t* offsets, int n,
                    int64_t stride, const Slab& slab) {
  constexpr int lanes = Lanes<typename AccOf<T>::type>::n;
  constexpr int vectors = kBytes == 64 && !kMag ? 2 : 1;  // what the registers hold
  constexpr int64_t group = vectors * lanes;
  int64_t c = 0;
  if constexpr (kContiguous && kPaired<T, kAct>) {
    for (; c + 2 * lanes <= slab.width; c += 2 * lanes)
      channels_paired<kAct, kClosed>(
          base + c, c + 4 * lanes <= slab.width ? base + c + 2 * lanes : next_block, offsets, n,
          slab, c);
  }
  for (; c + group <= slab.width; c += group) {
    const T* next = c + 2 * group <= slab.width ? base + (c + group) * stride : next_block;
    channels<T, kAct, kContiguous, kMag, kClosed, true, vectors>(
        base + c * stride, next, offsets, n, stride, lanes, 0, lanes, slab, c);
  }
  for (; c + lanes <= slab.width; c += lanes)
    channels<T, kAct, kContiguous, kMag, kClosed, true, 1>(base + c * stride, next_block, offsets,
                                                           n, stride, lanes, 0, lanes, slab, c);
  const int rest = static_cast<int>(slab.width - c);
  if (rest > 0 &&
      slab.width >= lanes) {  // the last full vector; its first lanes were carried before
    const int64_t back = slab.width - lanes;
    channels<T, kAct, kContiguous, kMag, kClosed, true, 1>(base + back * stride, next_block,
                                                           offsets, n, stride, lanes, lanes - rest,
                                                           lanes, slab, back);
  } else if (rest > 0) {
    channels<T, kAct, kContiguous, kMag, kClosed, false, 1>(base, base, offsets, n, stride, rest, 0,
                                                            rest, slab, 0);
  }
  if (slab.writer)
    slab.writer->columns(*slab.writer, base, offsets, stride, n, slab.first, slab.width);
}

template <class T, Activation kAct, bool kContiguous>
void channels_unit(const View& v, const Slab& slab, int64_t c0, int64_t b0, int64_t b1, int64_t p0,
                   int64_t p1, bool single) {
  int64_t offsets[kLaneBlock];
  const T* data = static_cast<const T*>(v.data) + c0 * v.channel_stride;
  const int64_t stride = v.channel_stride;
  if (single) {
    constexpr bool mag = kAct != Activation::kRelu && kAct != Activation::kIdentity;
    for (int64_t b = b0; b < b1; b += kLaneBlock) {
      const int n = static_cast<int>(b1 - b < kLaneBlock ? b1 - b : kLaneBlock);
      for (int i = 0; i < n; ++i) offsets[i] = (b + i) * v.sample_stride;
      channels_block<T, kAct, kContiguous, mag, false>(data, data + n * v.sample_stride, offsets, n,
                                                       stride, slab);
    }
    return end_single<kAct>(slab, static_cast<double>(b1 - b0));
  }
  const bool closed = p1 - p0 <= kLaneBlock;
  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t p = p0; p < p1; p += kLaneBlock) {
      const int n = static_cast<int>(p1 - p < kLaneBlock ? p1 - p : kLaneBlock);
      if (v.dims == 1)
        for (int i = 0; i < n; ++i) offsets[i] = (p + i) * v.stride[0];
      else
        for (int i = 0; i < n; ++i) offsets[i] = position_offset(v, p + i);
      const T* base = data + b * v.sample_stride;
      const T* next = p + n < p1 && v.dims == 1 ? base + n * v.stride[0] : base + v.sample_stride;
      if (closed)
        channels_block<T, kAct, kContiguous, false, true>(base, next, offsets, n, stride, slab);
      else
        channels_block<T, kAct, kContiguous, false, false>(base, next, offsets, n, stride, slab);
    }
    if (!closed) end_sample<kAct>(slab, static_cast<double>(p1 - p0));
  }
}

// ---------------------------------------------------------------------------------- merging
IDAP_INLINE vd select(vi64 mask, vd a, vd b) { return (vd)((mask & (vi64)a) | (~mask & (vi64)b)); }

struct Moments {
  vd n{}, mean{}, m2{};

  // Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample
  // variances (1979).
  void merge(vd n2, vd mean2, vd m22) {
    const vd total = n + n2, delta = mean2 - mean, share = n2 / total;
    const vi64 first = (vi64)(n == 0.0), finite = (vi64)(delta - delta == vd{});
    // With an infinity on one side or on both, m2 below is NaN as it should be.
    const vd merged = select(finite, mean + delta * share, mean + mean2);
    m2 = select(first, m22, m2 + m22 + delta * delta * (n * share));
    mean = select(first, mean2, merged);
    n = total;
  }
};

// Merges all units of kD channels, in a fixed order, and writes or updates the state.
void merge_channels(const View& v, const Plan& p, bool accumulate, const double* scratch,
                    int64_t slab_size, double* state, int64_t unit_c, int64_t lane, int valid) {
  const int64_t pitch = p.pitch(), positions = v.positions();
  const vd infinity = splat<vd>(std::numeric_limits<double>::infinity());
  Moments m;
  vd abs{}, act_sq{}, norm{}, abs_mean_sq{}, positive{}, mn = infinity, mx = -infinity;
  for (int64_t bu = 0; bu < p.sample_units; ++bu) {
    const int64_t samples = v.samples * (bu + 1) / p.sample_units - v.samples * bu / p.sample_units;
    vd sample_abs{}, sample_sq{};
    for (int64_t pu = 0; pu < p.position_units; ++pu) {
      const int64_t unit = (bu * p.position_units + pu) * p.channel_units + unit_c;
      const double* s = scratch + unit * slab_size + lane;
      auto get = [&](int r) { return load(s + r * pitch); };
      const vd n = splat<vd>(static_cast<double>(
          samples * (positions * (pu + 1) / p.position_units - positions * pu / p.position_units)));
      const vd part = get(sSum) / n, m2 = get(sSq) - get(sSum) * part;
      m.merge(n, get(sShift) + part, vmax(vd{}, m2));
      sample_abs += get(sAbs);
      sample_sq += get(sActSq);
      positive += get(sPositive);
      mn = vmin(get(sMin), mn);
      mx = vmax(get(sMax), mx);
      if (p.position_units == 1) {
        norm += get(sNorm);
        abs_mean_sq += get(sAbsMeanSq);
      }
    }
    if (p.position_units > 1) {
      const vd mean = sample_abs / static_cast<double>(positions);
      norm += vsqrt(sample_sq);
      abs_mean_sq += mean * mean;
    }
    abs += sample_abs;
    act_sq += sample_sq;
  }
  const vi64 clean = (vi64)(abs == abs);
  mn = select(clean, mn, abs);
  mx = select(clean, mx, abs);
  double* out = state + unit_c * p.channel_block + lane;
  vd samples = splat<vd>(static_cast<double>(v.samples));
  if (accumulate) {
    auto get = [&](int r) {
      const double* row = out + r * v.channels;
      return valid == kD ? load(row) : load_partial(row, valid);
    };
    const vd old_min = get(kMin), old_max = get(kMax);
    const vi64 first = (vi64)(get(kCount) == 0.0);  // its min and max say nothing yet
    Moments total{get(kCount), get(kMean), get(kM2)};
    total.merge(m.n, m.mean, m.m2);
    m = total;
    samples += get(kSamples);
    abs += get(kAbsSum);
    act_sq += get(kActSqSum);
    norm += get(kActNormSum);
    abs_mean_sq += get(kAbsMeanSqSum);
    positive += get(kPositive);
    mn = select(first | ((vi64)(old_min >= mn) | (vi64)(mn != mn)), mn, old_min);
    mx = select(first | ((vi64)(old_max <= mx) | (vi64)(mx != mx)), mx, old_max);
  }
  auto put = [&](int r, vd value) {
    std::memcpy(out + r * v.channels, &value, static_cast<size_t>(valid) * sizeof(double));
  };
  put(kCount, m.n);
  put(kSamples, samples);
  put(kMean, m.mean);
  put(kM2, m.m2);
  put(kAbsSum, abs);
  put(kActSqSum, act_sq);
  put(kActNormSum, norm);
  put(kAbsMeanSqSum, abs_mean_sq);
  put(kPositive, positive);
  put(kMin, mn);
  put(kMax, mx);
}

// Empties the slab; the first element of each channel becomes its shift.
template <class T>
void prepare(const View& v, const Slab& slab, int64_t c0, int64_t b0, int64_t p0) {
  for (int64_t i = 0; i < sRows * slab.pitch; ++i) slab.data[i] = 0.0;
  const T* first = static_cast<const T*>(v.data) + b0 * v.sample_stride + position_offset(v, p0) +
                   c0 * v.channel_stride;
  for (int64_t c = 0; c < slab.width; ++c) {
    const double k = to_double(first[c * v.channel_stride]);
    slab.row(sShift)[c] = k - k == 0.0 ? k : 0.0;
  }
  for (int64_t c = 0; c < slab.pitch; ++c) {
    slab.row(sMin)[c] = std::numeric_limits<double>::infinity();
    slab.row(sMax)[c] = -std::numeric_limits<double>::infinity();
  }
}

template <class T, Activation kAct>
void run_unit(const View& v, const Plan& p, int64_t unit, double* slab_data, const Writer* writer) {
  const int64_t cu = unit % p.channel_units, pu = unit / p.channel_units % p.position_units,
                bu = unit / p.channel_units / p.position_units;
  const int64_t c0 = cu * p.channel_block, positions = v.positions();
  const int64_t c1 = c0 + p.channel_block < v.channels ? c0 + p.channel_block : v.channels;
  const int64_t b0 = v.samples * bu / p.sample_units, b1 = v.samples * (bu + 1) / p.sample_units;
  const int64_t p0 = positions * pu / p.position_units,
                p1 = positions * (pu + 1) / p.position_units;
  const Slab slab{slab_data, c1 - c0, p.pitch(), c0, writer};
  prepare<T>(v, slab, c0, b0, p0);
  if (p.path == Path::kTile) return tiles_unit<T, kAct>(v, slab, c0, b0, b1);
  if (p.path == Path::kRow) {
    if (p.contiguous) return rows_unit<T, kAct, true>(v, slab, c0, b0, b1, p0, p1);
    return rows_unit<T, kAct, false>(v, slab, c0, b0, b1, p0, p1);
  }
  if (p.contiguous) return channels_unit<T, kAct, true>(v, slab, c0, b0, b1, p0, p1, p.single);
  return channels_unit<T, kAct, false>(v, slab, c0, b0, b1, p0, p1, p.single);
}

Plan plan_for(const View& v) {
  return v.dtype == DType::kFloat64 ? make_plan<double>(v) : make_plan<float>(v);
}

template <class T, Activation kAct>
void run(const View& v, const Plan& p, bool accumulate, double* scratch, double* state, int threads,
         const Writer* writer) {
  const int64_t units = p.units(), slab_size = sRows * p.pitch();
  const int64_t pieces = (p.channel_block + kD - 1) / kD;
  if (units == 1 || v.samples * v.channels * v.positions() < kSerialWork) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < units; ++u) {
      run_unit<T, kAct>(v, p, u, scratch + u * slab_size, writer);
      if (writer && writer->streams) fence_streams();
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.channel_units * pieces; ++i) {
      const int64_t unit_c = i / pieces, lane = i % pieces * kD;
      const int64_t left = v.channels - unit_c * p.channel_block - lane;
      const int64_t width = p.channel_block - lane < left ? p.channel_block - lane : left;
      if (width > 0)
        merge_channels(v, p, accumulate, scratch, slab_size, state, unit_c, lane,
                       width < kD ? static_cast<int>(width) : kD);
    }
  }
}

}  // namespace

size_t channel_stats_scratch(const View& v) {
  const Plan p = plan_for(v);
  return static_cast<size_t>(p.units() * sRows * p.pitch()) + writer_scratch(v.channels);
}

void channel_stats(const View& v, Activation activation, bool accumulate, double* scratch,
                   double* state, int threads, const NormAct* norm_act) {
  const Plan p = plan_for(v);
  Writer writer;
  const Writer* w = nullptr;
  if (norm_act) {
    writer = make_writer(v, *norm_act, scratch + p.units() * sRows * p.pitch());
    w = &writer;
  }
  dispatch_dtype(v.dtype, [&](auto tag) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(tag)>>;
    switch (activation) {
      case Activation::kIdentity:
        return run<T, Activation::kIdentity>(v, p, accumulate, scratch, state, threads, w);
      case Activation::kGelu:
        return run<T, Activation::kGelu>(v, p, accumulate, scratch, state, threads, w);
      case Activation::kSilu:
        return run<T, Activation::kSilu>(v, p, accumulate, scratch, state, threads, w);
      default:
        return run<T, Activation::kRelu>(v, p, accumulate, scratch, state, threads, w);
    }
  });
}

}  // namespace IDAP_ISA
}  // namespace idap
