// How the blocks of channel_stats put their parts together.
//
// A block leaves one record per channel of its tile: kQuantities doubles, all of which add up (or
// take the smaller or larger), so a record of records is a record. Deviations are taken from a
// pivot, the channel's first element: sums of (y - pivot) and (y - pivot)^2 of any part of the
// channel then add without a division. The pivot is one of the values, so of n values M2 >= sum (y
// - pivot)^2 / n: in double the subtraction at the end costs at most n * 2^-53 of relative error.
//
// The last block of a group of slices adds the group's records up, the last group of a channel tile
// finishes the tile and merges it into the running state. Every sum has a fixed order.
#pragma once

#include "device.cuh"

namespace idap {
namespace cuda {

enum Quantity : int {
  kDev = 0,    // sum of y - pivot
  kDev2 = 1,   // sum of (y - pivot)^2
  kAbs = 2,    // sum of |y|
  kActSq = 3,  // sum of act(y)^2
  kPos = 4,    // number of y > 0
  kLow = 5,    // smallest y, NaN left out
  kHigh = 6,   // largest y, NaN left out
  kNorm = 7,   // sum over samples of sqrt(sum of act(y)^2); only where rows are whole
  kAbsSq = 8,  // sum over samples of (mean |y|)^2; only where rows are whole
};
constexpr int kPartial = 7;  // quantities of a record whose rows are not whole

constexpr int kBufferDoubles = kQuantities * kThreads;  // shared memory of a block: 18 KiB

struct ChannelArgs {
  const void* data;
  int64_t samples, sample_stride, channels, channel_stride, positions;
  Walk walk;
  int lanes, tile;
  int split;  // a record holds a piece of one sample: its roots are taken when the row is whole
  int tiles, sample_blocks, pieces, slices;  // a launch has at most 2^30 blocks
  int group_samples, group_pieces, groups_per_row, groups;
  int64_t samples_per_block, piece;
  double* records;        // slices x tiles x kQuantities x tile
  double* group_records;  // groups x tiles x kQuantities x tile
  double* state;          // kRows x channels
  unsigned* tickets;      // tiles x (groups + 1)
  int accumulate, activation;
};

__device__ __forceinline__ double combine(int quantity, double a, double b) {
  if (quantity == kLow) return smaller(a, b);
  if (quantity == kHigh) return larger(a, b);
  return a + b;
}

__device__ __forceinline__ double neutral(int quantity) {
  if (quantity == kLow) return infinity<double>();
  if (quantity == kHigh) return -infinity<double>();
  return 0.0;
}

// Where portion i of n begins when `total` things are dealt to n takers as evenly as can be.
__device__ __forceinline__ int portion(int total, int i, int n) {
  const int each = total / n, more = total % n;
  return each * i + (i < more ? i : more);
}

template <typename T>
__device__ __forceinline__ typename AccOf<T>::type element(const T* p) {
  Item<T, 1> item;
  item.load(p);
  return item.get(0);
}

// The channel's first element, or zero if that is not finite.
template <typename T>
__device__ __forceinline__ double channel_pivot(const ChannelArgs& a, int64_t channel) {
  const double first = element(static_cast<const T*>(a.data) + channel * a.channel_stride);
  return finite(first) ? first : 0.0;
}

// The address of quantity q of channel c of a block's record.
template <typename Pointer>
__device__ __forceinline__ Pointer record_slot(const ChannelArgs& a, Pointer records, int slice,
                                               int tile, int q, int channel) {
  return records + ((static_cast<int64_t>(slice) * a.tiles + tile) * kQuantities + q) * a.tile +
         channel;
}

// Adds quantities [First, First + Count) of n records up, into the thread's slots.
template <int First, int Count>
__device__ __forceinline__ void sum_portion(const double* p, int64_t stride, int tile, int n,
                                            double* slots) {
  double sum[Count];
#pragma unroll
  for (int j = 0; j < Count; ++j) sum[j] = neutral(First + j);
#pragma unroll 2
  for (int r = 0; r < n; ++r, p += stride) {
#pragma unroll
    for (int j = 0; j < Count; ++j)
      sum[j] = combine(First + j, sum[j], __ldcg(p + (First + j) * tile));
  }
#pragma unroll
  for (int j = 0; j < Count; ++j) slots[(First + j) * kThreads] = sum[j];
}

// Adds records [first, first + rows * pieces) of a tile up: quantity q of channel t of the tile
// ends in buffer[q * kThreads + t], which thread t may read. Threads share the records in fixed
// portions. With kTake, `pieces` neighbouring records make a sample, whose roots are taken here;
// with kAdd the records hold roots, which add up like the rest; with kNone there are none yet. The
// caller has passed a barrier since the buffer was last read.
enum class Roots { kNone, kTake, kAdd };

__device__ __forceinline__ void add_records(const ChannelArgs& a, const double* records, int tile,
                                            int first, int rows, int pieces, Roots how,
                                            double* buffer) {
  const int channel = static_cast<int>(threadIdx.x) & (a.tile - 1);
  const int part = static_cast<int>(threadIdx.x) / a.tile;
  const int parts = kThreads / a.tile;
  const bool take = how == Roots::kTake;
  const bool whole = take && rows >= parts;  // a thread's portion is whole rows
  const int shares = take && !whole ? (parts / rows < 32 ? parts / rows : 32) : 1;

  int begin, end;
  if (take && !whole) {
    const int row = part / shares, share = part % shares;
    begin = row < rows ? row * pieces + portion(pieces, share, shares) : 0;
    end = row < rows ? row * pieces + portion(pieces, share + 1, shares) : 0;
  } else {
    const int unit = take ? pieces : 1, units = take ? rows : rows * pieces;
    begin = portion(units, part, parts) * unit;
    end = portion(units, part + 1, parts) * unit;
  }

  const int64_t stride = static_cast<int64_t>(a.tiles) * kQuantities * a.tile;
  const double* p = record_slot(a, records, first + begin, tile, 0, channel);
  double* mine = buffer + threadIdx.x;
  // A few quantities at a time: all nine at once would cost every thread of the launch registers.
  sum_portion<kDev, 2>(p, stride, a.tile, end - begin, mine);
  sum_portion<kPos, 3>(p, stride, a.tile, end - begin, mine);
  const double mean_of = 1.0 / static_cast<double>(a.positions);
  if (!take) {
    sum_portion<kAbs, 2>(p, stride, a.tile, end - begin, mine);
    sum_portion<kNorm, 2>(p, stride, a.tile, how == Roots::kAdd ? end - begin : 0, mine);
  } else if (whole) {
    double all_abs = 0.0, all_sq = 0.0, norm = 0.0, abs_sq = 0.0;
    for (int r = begin; r < end; r += pieces, p += pieces * stride) {
      sum_portion<kAbs, 2>(p, stride, a.tile, pieces, mine);
      all_abs += mine[kAbs * kThreads];
      all_sq += mine[kActSq * kThreads];
      const double mean = mine[kAbs * kThreads] * mean_of;
      norm += root(mine[kActSq * kThreads]);
      abs_sq += mean * mean;
    }
    mine[kAbs * kThreads] = all_abs;
    mine[kActSq * kThreads] = all_sq;
    mine[kNorm * kThreads] = norm;
    mine[kAbsSq * kThreads] = abs_sq;
  } else {
    sum_portion<kAbs, 2>(p, stride, a.tile, end - begin, mine);
    __syncthreads();
    double norm = 0.0, abs_sq = 0.0;
    if (part % shares == 0 && part / shares < rows) {
      double abs_sum = 0.0, square_sum = 0.0;
      for (int s = 0; s < shares; ++s) {
        abs_sum += mine[kAbs * kThreads + s * a.tile];
        square_sum += mine[kActSq * kThreads + s * a.tile];
      }
      norm = root(square_sum);
      abs_sq = abs_sum * mean_of * (abs_sum * mean_of);
    }
    mine[kNorm * kThreads] = norm;
    mine[kAbsSq * kThreads] = abs_sq;
  }
  for (int half = parts >> 1; half > 0; half >>= 1) {
    __syncthreads();
    if (part < half) {
#pragma unroll 1
      for (int q = 0; q < kQuantities; ++q) {
        mine[q * kThreads] = combine(q, mine[q * kThreads], mine[q * kThreads + half * a.tile]);
      }
    }
  }
}

// Merges what a call saw of a channel, sums[q * kThreads], into the running state, or writes it
// there.
__device__ __forceinline__ void update_state(const ChannelArgs& a, int64_t channel, double pivot,
                                             const double* sums) {
  const double nan = infinity<double>() - infinity<double>();
  const bool any_nan =
      sums[kAbs * kThreads] != sums[kAbs * kThreads];  // |y| cannot cancel: a NaN in the data
  const int64_t C = a.channels;
  double* s = a.state + channel;
  const double before = a.accumulate ? s[kCount * C] : 0.0;
  const bool merge = before > 0.0;
  const double count = static_cast<double>(a.samples) * static_cast<double>(a.positions);
  const double share = count / (before + count);
  const double dev = sums[kDev * kThreads];
  double mean = pivot + dev / count;
  double m2 = sums[kDev2 * kThreads] - dev * (dev / count);
  if (m2 < 0.0) m2 = 0.0;
  if (merge) {
    const double old = s[kMean * C], delta = mean - old;
    m2 = s[kM2 * C] + m2 + delta * delta * before * share;
    mean = finite(delta) ? old + delta * share : old + mean;
  }
  s[kCount * C] = before + count;
  s[kMean * C] = mean;
  s[kM2 * C] = m2;
  const double low = any_nan ? nan : sums[kLow * kThreads],
               high = any_nan ? nan : sums[kHigh * kThreads];
  const double old_low = merge ? s[kMin * C] : low, old_high = merge ? s[kMax * C] : high;
  s[kMin * C] = old_low != old_low || low != low ? nan : smaller(old_low, low);
  s[kMax * C] = old_high != old_high || high != high ? nan : larger(old_high, high);
  s[kSamples * C] = static_cast<double>(a.samples) + (merge ? s[kSamples * C] : 0.0);
  // The plain sums, one at a time: unrolled, they would cost every thread of the launch registers.
#pragma unroll 1
  for (int i = 0; i < 5; ++i) {
    const int q = 0x87432 >> 4 * i & 15, row = 0x76854 >> 4 * i & 15;
    const bool poisoned = any_nan && q != kPos;
    double* p = s + row * C;
    *p = poisoned ? nan : sums[q * kThreads] + (merge ? *p : 0.0);
  }
}

static_assert(kAbs == 2 && kActSq == 3 && kPos == 4 && kNorm == 7 && kAbsSq == 8 && kAbsSum == 4 &&
                  kActSqSum == 5 && kPositive == 8 && kActNormSum == 6 && kAbsMeanSqSum == 7,
              "update_state counts on these numbers");

// Called by every thread of a block after the block's record was written.
template <typename T>
__device__ __forceinline__ void finish(const ChannelArgs& a, int tile, int sample_block, int piece,
                                       double* buffer) {
  unsigned* tickets = a.tickets + static_cast<int64_t>(tile) * (a.groups + 1);
  const bool rows_in_group = a.groups_per_row == 1;
  int group, first, rows, pieces;
  if (rows_in_group) {
    group = sample_block / a.group_samples;
    const int begin = group * a.group_samples;
    rows = a.sample_blocks - begin < a.group_samples ? a.sample_blocks - begin : a.group_samples;
    pieces = a.pieces;
    first = begin * a.pieces;
  } else {
    const int sub = piece / a.group_pieces, begin = sub * a.group_pieces;
    group = sample_block * a.groups_per_row + sub;
    rows = 1;
    pieces = a.pieces - begin < a.group_pieces ? a.pieces - begin : a.group_pieces;
    first = sample_block * a.pieces + begin;
  }
  const int64_t channel = static_cast<int64_t>(tile) * a.tile + threadIdx.x;
  const bool mine = static_cast<int>(threadIdx.x) < a.tile;
  const double* sums = buffer + threadIdx.x;
  const double* records = a.records;
  Roots how = !a.split ? Roots::kAdd : (rows_in_group ? Roots::kTake : Roots::kNone);
  const int levels = a.groups > 1 ? 2 : 1;
#pragma unroll 1  // one copy of the code, and of its registers, for both levels
  for (int level = 0; level < levels; ++level) {
    if (a.slices == 1) {
      __syncthreads();
    } else if (!last_block(tickets + group, static_cast<unsigned>(rows * pieces))) {
      return;
    }
    add_records(a, records, tile, first, rows, pieces, how, buffer);
    if (level + 1 < levels && mine) {
#pragma unroll 1
      for (int q = 0; q < kQuantities; ++q) {
        *record_slot(a, a.group_records, group, tile, q, static_cast<int>(threadIdx.x)) =
            sums[q * kThreads];
      }
    }
    records = a.group_records;
    first = 0;
    rows = rows_in_group ? a.groups : a.sample_blocks;
    pieces = a.groups_per_row;
    how = rows_in_group ? Roots::kAdd : Roots::kTake;
    group = a.groups;
  }
  if (mine && channel < a.channels) update_state(a, channel, channel_pivot<T>(a, channel), sums);
}

}  // namespace cuda
}  // namespace idap
