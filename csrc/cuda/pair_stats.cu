// pair_stats: both tensors read together, once. A row is a sample or a token. Short rows are whole
// rows of `lanes` neighbouring threads; long ones go to blocks in pieces, and the last block of a
// row adds the pieces up in order.
#include "device.cuh"
#include "launchers.h"

namespace idap {
namespace cuda {
namespace {

constexpr int kChunk = 64;  // values a thread adds up before it hands them to the doubles

struct PairArgs {
  PairView view;  // sizes and strides in items: the innermost dimension counts vectors
  FastDiv row_div[kPairDims], div[kPairDims];
  int wide_rows, wide_items, lanes;
  int64_t rows, items, pieces, piece;
  double* out;      // kPairRows x rows
  double* records;  // rows x pieces x kPairRows
  unsigned* tickets;
};

struct Offsets {
  int64_t x, y;
};

__device__ __forceinline__ Offsets pair_offsets(int64_t i, int dims, bool wide,
                                                const int64_t (&size)[kPairDims],
                                                const FastDiv (&div)[kPairDims],
                                                const int64_t (&sx)[kPairDims],
                                                const int64_t (&sy)[kPairDims]) {
  Offsets o = {0, 0};
#pragma unroll
  for (int d = kPairDims - 1; d > 0; --d) {
    if (d < dims) {
      const int64_t q = wide ? i / size[d] : divide(static_cast<uint32_t>(i), div[d]);
      const int64_t r = i - q * size[d];
      o.x += r * sx[d];
      o.y += r * sy[d];
      i = q;
    }
  }
  o.x += i * sx[0];
  o.y += i * sy[0];
  return o;
}

template <typename T, int V, int U>
struct PairLane {
  using Acc = typename AccOf<T>::type;
  double total[kPairRows] = {0, 0, 0, 0};
  Acc sum[kPairRows] = {0, 0, 0, 0};
  int chunk = 0;

  __device__ __forceinline__ void flush() {
#pragma unroll
    for (int q = 0; q < kPairRows; ++q) {
      total[q] += sum[q];
      sum[q] = Acc(0);
    }
    chunk = 0;
  }

  // Items i, i + step, ... < end of the row that begins at x and y.
  __device__ __forceinline__ void take(const PairArgs& a, const T* x, const T* y, int64_t i,
                                       int64_t end, int step) {
    const PairView& v = a.view;
    const bool linear = v.dims <= 1;
    for (; i < end; i += static_cast<int64_t>(U) * step) {
      Item<T, V> xs[U], ys[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t at = i + static_cast<int64_t>(u) * step;
        if (at < end) {
          Offsets o = {at * v.stride_x[0], at * v.stride_y[0]};
          if (!linear)
            o = pair_offsets(at, v.dims, a.wide_items, v.size, a.div, v.stride_x, v.stride_y);
          xs[u].load(x + o.x);
          ys[u].load(y + o.y);
        }
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (i + static_cast<int64_t>(u) * step < end) {
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const Acc p = xs[u].get(j), q = ys[u].get(j), d = q - p;
            sum[kXX] += p * p;
            sum[kYY] += q * q;
            sum[kXY] += p * q;
            sum[kDD] += d * d;
          }
        }
      }
      chunk += U * V;
      if (chunk >= kChunk) flush();
    }
  }
};

template <typename T, int V, int U>
__global__ void __launch_bounds__(kThreads, 3) pair_kernel(const __grid_constant__ PairArgs a) {
  IDAP_SHARED(double, buffer, kPairRows* kThreads);
  const int tid = static_cast<int>(threadIdx.x);
  const PairView& v = a.view;
  const bool by_block = a.lanes == kThreads;
  const int64_t piece = by_block ? blockIdx.x % a.pieces : 0;
  const int64_t row = by_block
                          ? blockIdx.x / a.pieces
                          : static_cast<int64_t>(blockIdx.x) * (kThreads / a.lanes) + tid / a.lanes;
  const bool active = row < a.rows;
  PairLane<T, V, U> lane;
  if (active) {
    const Offsets o =
        pair_offsets(row, v.row_dims, a.wide_rows, v.row_size, a.row_div, v.row_x, v.row_y);
    const int64_t begin = piece * a.piece;
    const int64_t end = begin + a.piece < a.items ? begin + a.piece : a.items;
    lane.take(a, static_cast<const T*>(v.x) + o.x, static_cast<const T*>(v.y) + o.y,
              begin + (by_block ? tid : tid & (a.lanes - 1)), end, a.lanes);
    lane.flush();
  }
  double sum[kPairRows];
#pragma unroll
  for (int q = 0; q < kPairRows; ++q) sum[q] = lanes_sum(lane.total[q], by_block ? 32 : a.lanes);
  if (!by_block) {
    if (active && (tid & (a.lanes - 1)) == 0) {
#pragma unroll
      for (int q = 0; q < kPairRows; ++q) a.out[q * a.rows + row] = sum[q];
    }
    return;
  }

  constexpr int kWarps = kThreads / 32;
  if (tid % 32 == 0) {
#pragma unroll
    for (int q = 0; q < kPairRows; ++q) buffer[q * kWarps + tid / 32] = sum[q];
  }
  __syncthreads();
  double* target =
      a.pieces > 1 ? a.records + blockIdx.x * static_cast<int64_t>(kPairRows) : a.out + row;
  const int64_t step = a.pieces > 1 ? 1 : a.rows;
  if (tid < kPairRows) {
    double s = 0.0;
    for (int w = 0; w < kWarps; ++w) s += buffer[tid * kWarps + w];
    target[tid * step] = s;
  }
  if (a.pieces == 1 || !last_block(a.tickets + row, static_cast<unsigned>(a.pieces))) return;

  const double* p = a.records + row * a.pieces * kPairRows;
#pragma unroll
  for (int q = 0; q < kPairRows; ++q) sum[q] = 0.0;
  for (int64_t r = tid; r < a.pieces; r += kThreads) {
#pragma unroll
    for (int q = 0; q < kPairRows; ++q) sum[q] += __ldcg(p + r * kPairRows + q);
  }
#pragma unroll
  for (int q = 0; q < kPairRows; ++q) buffer[q * kThreads + tid] = sum[q];
  for (int half = kThreads / 2; half > 0; half >>= 1) {
    __syncthreads();
    if (tid < half) {
#pragma unroll
      for (int q = 0; q < kPairRows; ++q)
        buffer[q * kThreads + tid] += buffer[q * kThreads + tid + half];
    }
  }
  __syncthreads();
  if (tid < kPairRows) a.out[tid * a.rows + row] = buffer[tid * kThreads];
}

template <typename T, int V, int U>
Status launch(const PairArgs& args, int64_t blocks, void* stream) {
  const auto kernel = pair_kernel<T, V, U>;
  IDAP_LAUNCH(kernel, blocks, static_cast<cudaStream_t>(stream), args);
  return static_cast<Status>(cudaGetLastError());
}

template <typename T>
Status launch_dtype(const PairArgs& args, int vec, int64_t blocks, void* stream) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(T));
  return vec > 1 ? launch<T, kVec, 2>(args, blocks, stream) : launch<T, 1, 4>(args, blocks, stream);
}

}  // namespace

Status pair_stats(const PairView& view, const PairPlan& plan, double* out, double* scratch,
                  unsigned* tickets, void* stream) {
  PairArgs a;
  a.view = view;
  a.rows = view.rows();
  a.items = view.elements() / plan.vec;
  if (plan.vec > 1) {
    const int inner = view.dims - 1;
    a.view.size[inner] /= plan.vec;
    a.view.stride_x[inner] = a.view.stride_y[inner] = plan.vec;
  }
  a.wide_rows = a.rows >= (int64_t{1} << 31);
  a.wide_items = a.items >= (int64_t{1} << 31);
  for (int d = 0; d < kPairDims; ++d) {
    a.row_div[d] = make_fast_div(d < view.row_dims && !a.wide_rows ? view.row_size[d] : 1);
    a.div[d] = make_fast_div(d < view.dims && !a.wide_items ? a.view.size[d] : 1);
  }
  a.lanes = plan.lanes;
  a.pieces = plan.pieces;
  a.piece = plan.piece;
  a.out = out;
  a.records = scratch;
  a.tickets = tickets;
  switch (view.dtype) {
    case DType::kFloat32:
      return launch_dtype<float>(a, plan.vec, plan.blocks, stream);
    case DType::kFloat64:
      return launch_dtype<double>(a, plan.vec, plan.blocks, stream);
    case DType::kFloat16:
      return launch_dtype<Half>(a, plan.vec, plan.blocks, stream);
    default:
      return launch_dtype<BFloat>(a, plan.vec, plan.blocks, stream);
  }
}

}  // namespace cuda
}  // namespace idap
