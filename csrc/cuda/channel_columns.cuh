// channel_stats and bn_act_stats where channels are neighbours in memory: channels-last maps and
// tokens. A block takes a tile of channels and a piece of the positions of one sample; a thread
// walks positions with V neighbouring channels. The roots of a sample are taken when its pieces are
// added up.
#pragma once

#include "channel_writes.cuh"

namespace idap {
namespace cuda {
namespace {

constexpr int kChunk = 64;  // positions a thread adds up before it hands them to the doubles

template <typename T>
struct Column {
  using Acc = typename AccOf<T>::type;
  Acc k = 0, s1 = 0, s2 = 0, abs = 0, sq = 0, sum_abs = 0, sum_sq = 0;
  Acc low = infinity<Acc>(), high = -infinity<Acc>();
  unsigned positive = 0;
  double dev = 0, dev2 = 0;

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

  __device__ __forceinline__ void flush(double pivot, int chunk) {
    const double n = chunk, shift = static_cast<double>(k) - pivot, s = s1;
    dev += s + n * shift;
    dev2 += static_cast<double>(s2) + shift * (2.0 * s + n * shift);
    sum_abs += abs;
    sum_sq += sq;
    s1 = s2 = abs = sq = Acc(0);
  }
};

template <typename Write, typename T, int V, int U, bool Relu>
__device__ __forceinline__ void take(Column<T> (&columns)[V], const Item<T, V> (&items)[U],
                                     int count, int activation) {
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (u < count) {
#pragma unroll
      for (int i = 0; i < V; ++i) columns[i].template add<Write, Relu>(items[u].get(i), activation);
    }
  }
}

template <typename Write, typename T, int V, int U>
__global__ void __launch_bounds__(kThreads, 2)
    channel_columns(const __grid_constant__ typename Write::Args a) {
  IDAP_SHARED(double, buffer, kBufferDoubles);
  const int tid = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x);
  const int tile = block % a.tiles, slice = block / a.tiles;
  const int piece = slice % a.pieces, sample = slice / a.pieces;
  const int x = tid & (a.lanes - 1), y = tid / a.lanes, rows = kThreads / a.lanes;
  const int64_t channel = static_cast<int64_t>(tile) * a.tile + x * V;
  const bool active = channel < a.channels;  // V divides the number of channels
  const T* data = static_cast<const T*>(a.data) + sample * a.sample_stride +
                  (active ? channel : 0) * a.channel_stride;
  const bool linear = a.walk.dims <= 1;
  const int64_t stride = a.walk.stride[0];
  const bool relu = a.activation == static_cast<int>(Activation::kRelu);
  // One mask an item is little beside a store: not worth another copy of the code.
  constexpr bool kUnmasked = !Write::kWrites || V == 1;

  Write write;
  write.begin(a, buffer, static_cast<int64_t>(tile) * a.tile, x * V);

  Column<T> columns[V];
  const int64_t begin = piece * a.piece;
  const int64_t end = active ? (begin + a.piece < a.positions ? begin + a.piece : a.positions) : 0;
  int chunk = 0;
  for (int64_t p = begin + y; p < end; p += static_cast<int64_t>(U) * rows) {
    Item<T, V> items[U];
    const int64_t left = (end - p + rows - 1) / rows;
    const int count = left < U ? static_cast<int>(left) : U;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u < count) {
        const int64_t at = p + static_cast<int64_t>(u) * rows;
        Write::load(items[u], data + (linear ? at * stride : Write::offset(a.walk, at)));
      }
    }
    if (chunk == 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const typename AccOf<T>::type first = items[0].get(i);
        columns[i].k = finite(first) ? first : 0;
      }
    }
    if (relu && count == U && kUnmasked) {
      take<Write, T, V, U, true>(columns, items, U, 0);
    } else if (relu) {
      take<Write, T, V, U, true>(columns, items, count, 0);
    } else {
      take<Write, T, V, U, false>(columns, items, count, a.activation);
    }
    if constexpr (Write::kWrites) {
      write.apply(a, items, [=](int u) { return u < count; });
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (u < count) {
          const int64_t at = p + static_cast<int64_t>(u) * rows;
          Write::store(a, items[u], data + (linear ? at * stride : Write::offset(a.walk, at)));
        }
      }
    }
    chunk += count;
    if (chunk > kChunk - U) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        columns[i].flush(channel_pivot<T>(a, channel + i), chunk);
      }
      chunk = 0;
    }
  }
  if (chunk > 0) {
#pragma unroll
    for (int i = 0; i < V; ++i) columns[i].flush(channel_pivot<T>(a, channel + i), chunk);
  }

  // Two quantities a round: rows x tile values each, added up over the rows in order.
#pragma unroll
  for (int round = 0; round < kPartial; round += 2) {
    if (round > 0 || Write::kWrites) __syncthreads();
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Column<T>& c = columns[i];
      const double v[kPartial + 1] = {c.dev,
                                      c.dev2,
                                      static_cast<double>(c.sum_abs),
                                      static_cast<double>(c.sum_sq),
                                      static_cast<double>(c.positive),
                                      c.low,
                                      c.high,
                                      0.0};
      double* slot = buffer + y * a.tile + x * V + i;
      slot[0] = v[round];
      slot[kThreads * V] = v[round + 1];
    }
    __syncthreads();
    for (int j = tid; j < 2 * a.tile; j += kThreads) {
      const int second = j / a.tile, c = j & (a.tile - 1), q = round + second;
      if (q < kPartial) {
        const double* p = buffer + second * kThreads * V + c;
        double sum = p[0];
        for (int r = 1; r < rows; ++r) sum = combine(q, sum, p[r * a.tile]);
        *record_slot(a, a.records, slice, tile, q, c) = sum;
      }
    }
  }
  finish<T>(a, tile, sample, piece, buffer);
}

template <typename Write, typename T, int V, int U>
Status launch_columns(const typename Write::Args& args, int64_t blocks, void* stream) {
  static_assert(2 * kThreads * V <= kBufferDoubles, "two quantities must fit the buffer");
  const auto kernel = channel_columns<Write, T, V, U>;
  IDAP_LAUNCH(kernel, blocks, static_cast<cudaStream_t>(stream), args);
  return static_cast<Status>(cudaGetLastError());
}

template <typename Write, typename T>
Status launch_columns_of(const typename Write::Args& args, int vec, int64_t blocks, void* stream) {
  if constexpr (sizeof(T) == 8) {
    return vec == 2 ? launch_columns<Write, T, 2, 4>(args, blocks, stream)
                    : launch_columns<Write, T, 1, 4>(args, blocks, stream);
  } else {
    return vec == 4 ? launch_columns<Write, T, 4, 4>(args, blocks, stream)
                    : launch_columns<Write, T, 1, 8>(args, blocks, stream);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace idap
