// channel_stats and bn_act_stats where the positions of a channel are neighbours in memory, or
// where rows are short enough for one thread each. A row is one sample of one channel. Either
// `lanes` neighbouring threads take whole rows, sample after sample of one channel (kRows), or the
// block takes one piece of one row (kPieces).
#pragma once

#include "channel_writes.cuh"

namespace idap {
namespace cuda {
namespace {

// Values a thread adds up in its accumulators before it hands them to the doubles.
constexpr int kChunk = 64;
constexpr int kPivot = kPos;  // a slot that is free until the end

// What a thread knows of its channel. `chunk` values since the last flush are summed as deviations
// from k, one of them: with at most 64 of them the sums keep their relative error small however far
// the mean lies from zero.
template <typename T>
struct Lane {
  using Acc = typename AccOf<T>::type;
  Acc k = 0, s1 = 0, s2 = 0, abs = 0, sq = 0;
  Acc row_abs = 0, row_sq = 0;  // of this row, up to the last flush
  Acc norm = 0, abs_sq = 0;     // of finished rows, up to the last flush
  Acc low = infinity<Acc>(), high = -infinity<Acc>();
  int chunk = 0;
  unsigned positive = 0;
  double* slots;  // the thread's own column of the block's buffer: its doubles, and the pivot

  __device__ __forceinline__ void begin(double* column, double pivot) {
    slots = column;
#pragma unroll
    for (int q = 0; q < kQuantities; ++q) slots[q * kThreads] = 0.0;
    slots[kPivot * kThreads] = pivot;
  }

  __device__ __forceinline__ void start_chunk(Acc first) { k = finite(first) ? first : Acc(0); }

  template <typename Write, bool Relu>
  __device__ __forceinline__ void add(Acc y, int activation) {
    const Acc d = y - k;
    s1 += d;
    s2 += d * d;
    abs += magnitude(y);
    const Acc a = Relu ? larger(y, Acc(0)) : Write::statistic(y, activation);
    sq += a * a;
    positive += y > Acc(0) ? 1u : 0u;
    low = smaller(low, y);
    high = larger(high, y);
  }

  __device__ __forceinline__ void flush() {
    const double n = chunk, shift = static_cast<double>(k) - slots[kPivot * kThreads], s = s1;
    slots[kDev * kThreads] += s + n * shift;
    slots[kDev2 * kThreads] += static_cast<double>(s2) + shift * (2.0 * s + n * shift);
    slots[kNorm * kThreads] += norm;
    slots[kAbsSq * kThreads] += abs_sq;
    row_abs += abs;
    row_sq += sq;
    s1 = s2 = abs = sq = norm = abs_sq = Acc(0);
    chunk = 0;
  }
};

template <typename Write, typename T, int V, int U, bool Relu, bool Tail>
__device__ __forceinline__ void take(Lane<T>& lane, const Item<T, V> (&items)[U], int left,
                                     int step, int activation) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (!Tail || u * step < left) {
#pragma unroll
      for (int i = 0; i < V; ++i) lane.template add<Write, Relu>(items[u].get(i), activation);
      lane.chunk += V;
    }
  }
}

// Adds items i, i + step, ... < count to the lane, of the `count` items of a row from `first` on.
template <typename Write, typename T, int V, int U>
__device__ __forceinline__ void take_row(const typename Write::Args& a, Lane<T>& lane,
                                         const Write& write, const T* row, int64_t first, int i,
                                         int count, int step) {
  const bool relu = a.activation == static_cast<int>(Activation::kRelu);
  // One mask an item is little beside a store: not worth another copy of the code.
  constexpr bool kUnmasked = !Write::kWrites || V == 1;
#pragma unroll 1
  for (; i < count; i += U * step) {
    Item<T, V> items[U];
    const int left = count - i;
    const bool full = (U - 1) * step < left;
    if (a.walk.dims <= 1) {
      const T* p = row + (first + i) * a.walk.stride[0];
      const int64_t ahead = step * a.walk.stride[0];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (full || u * step < left) Write::load(items[u], p + u * ahead);
      }
    } else {
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (full || u * step < left)
          Write::load(items[u], row + Write::offset(a.walk, first + i + u * step));
      }
    }
    if (lane.chunk == 0) lane.start_chunk(items[0].get(0));
    if (relu && full && kUnmasked) {
      take<Write, T, V, U, true, false>(lane, items, left, step, 0);
    } else if (relu) {
      take<Write, T, V, U, true, true>(lane, items, left, step, 0);
    } else {
      take<Write, T, V, U, false, true>(lane, items, left, step, a.activation);
    }
    if constexpr (Write::kWrites) {
      write.apply(a, items, [=](int u) { return full || u * step < left; });
      if (a.walk.dims <= 1) {
        const T* p = row + (first + i) * a.walk.stride[0];
        const int64_t ahead = step * a.walk.stride[0];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (full || u * step < left) Write::store(a, items[u], p + u * ahead);
        }
      } else {
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (full || u * step < left)
            Write::store(a, items[u], row + Write::offset(a.walk, first + i + u * step));
        }
      }
    }
    if (lane.chunk > kChunk - U * V) lane.flush();
  }
}

template <typename Write, typename T, int V, int U>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 3)
    channel_rows(const __grid_constant__ typename Write::Args a) {
  using Acc = typename AccOf<T>::type;
  IDAP_SHARED(double, buffer, kBufferDoubles);
  const int tid = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x);
  const int tile = block % a.tiles, slice = block / a.tiles;
  const int piece = slice % a.pieces, sample_block = slice / a.pieces;
  const int groups = kThreads / a.lanes;  // of neighbouring threads that share a row
  const int group = tid / a.lanes, in_group = tid & (a.lanes - 1);
  const int together = groups / a.tile;  // samples (or, in kPieces, parts of a row) side by side
  const int side = group / a.tile;
  const int64_t channel = static_cast<int64_t>(tile) * a.tile + (group & (a.tile - 1));
  const bool active = channel < a.channels;
  const T* data = static_cast<const T*>(a.data) + (active ? channel : 0) * a.channel_stride;

  Lane<T> lane;
  lane.begin(buffer + tid, channel_pivot<T>(a, active ? channel : 0));
  Write write;
  write.begin(a, buffer + tid, active ? channel : 0);
  const Acc mean_of = Acc(1) / static_cast<Acc>(a.positions);
  int step = a.lanes, start = in_group, count = static_cast<int>(a.walk.items), rounds = 1;
  int64_t first = 0, samples = 1;  // samples from the first of this block on
  if (a.split) {
    step = kThreads;
    start = tid;
    first = piece * a.piece;
    count = static_cast<int>(a.walk.items - first < a.piece ? a.walk.items - first : a.piece);
    data += sample_block * a.sample_stride;
  } else {
    const int64_t before = sample_block * a.samples_per_block;
    samples = a.samples - before < a.samples_per_block ? a.samples - before : a.samples_per_block;
    rounds = static_cast<int>((samples + together - 1) / together);
    data += (before + side) * a.sample_stride;
    samples = active ? samples - side : 0;
  }
  // Every thread of a warp makes the same number of rounds: the sums of a row need all of them.
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    if (active && samples > 0)
      take_row<Write, T, V, U>(a, lane, write, data, first, start, count, step);
    data += together * a.sample_stride;
    samples -= together;
    lane.row_abs += lane.abs;
    lane.row_sq += lane.sq;
    lane.slots[kAbs * kThreads] += lane.row_abs;
    lane.slots[kActSq * kThreads] += lane.row_sq;
    if (!a.split) {
      const Acc mean = lanes_sum(lane.row_abs, a.lanes) * mean_of;
      lane.norm += root(lanes_sum(lane.row_sq, a.lanes));
      lane.abs_sq += mean * mean;
    }
    lane.row_abs = lane.row_sq = lane.abs = lane.sq = Acc(0);
  }
  lane.flush();

  // One value per group of lanes, left with its first thread; then the groups of a channel in
  // order.
  double* slots = buffer + tid;
#pragma unroll
  for (int q = 0; q < kQuantities; ++q) {
    double v = slots[q * kThreads];
    if (q == kPos) v = static_cast<double>(lane.positive);
    if (q == kLow) {
      v = lanes_min(lane.low, a.lanes);
    } else if (q == kHigh) {
      v = lanes_max(lane.high, a.lanes);
    } else if (q < kPartial) {
      v = lanes_sum(v, a.lanes);
    }
    slots[q * kThreads] = v;
  }
  __syncthreads();
  for (int j = tid; j < kQuantities * a.tile; j += kThreads) {
    const int q = j / a.tile, c = j & (a.tile - 1);
    const double* p = buffer + q * kThreads + c * a.lanes;
    double sum = p[0];
    for (int s = 1; s < together; ++s) sum = combine(q, sum, p[s * a.tile * a.lanes]);
    *record_slot(a, a.records, slice, tile, q, c) = sum;
  }
  finish<T>(a, tile, sample_block, piece, buffer);
}

template <typename Write, typename T, int V, int U>
Status launch_rows(const typename Write::Args& args, int64_t blocks, void* stream) {
  const auto kernel = channel_rows<Write, T, V, U>;
  IDAP_LAUNCH(kernel, blocks, static_cast<cudaStream_t>(stream), args);
  return static_cast<Status>(cudaGetLastError());
}

template <typename Write, typename T>
Status launch_rows_of(const typename Write::Args& args, int vec, int64_t blocks, void* stream) {
  if constexpr (sizeof(T) == 8) {
    return vec == 2 ? launch_rows<Write, T, 2, 4>(args, blocks, stream)
                    : launch_rows<Write, T, 1, 4>(args, blocks, stream);
  } else {
    if constexpr (sizeof(T) == 2) {
      if (vec == 8) return launch_rows<Write, T, 8, 4>(args, blocks, stream);
    }
    return vec == 4 ? launch_rows<Write, T, 4, 4>(args, blocks, stream)
                    : launch_rows<Write, T, 1, 8>(args, blocks, stream);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace idap
