// filter_norms: the L2 norm of every filter of every layer of a model, in one launch. The table of
// layers is a kernel parameter. A warp takes a filter, a whole block where filters are long.
#include "device.cuh"
#include "launchers.h"

namespace idap {
namespace cuda {
namespace {

constexpr int kChunk = 64;
constexpr int kWarps = kThreads / 32;

// Kernel parameters may take 32764 bytes since CUDA 12.1, 4096 before.
#if !defined(__CUDACC__) || CUDART_VERSION >= 12010
constexpr int kParameterBytes = 32764;
#else
constexpr int kParameterBytes = 4096;
#endif
constexpr int kEntries = (kParameterBytes - 16) / static_cast<int>(sizeof(FilterEntry));

struct FilterTable {
  int32_t count;
  FilterEntry entries[kEntries];
};
static_assert(sizeof(FilterTable) <= kParameterBytes,
              "the table must fit the parameters of a kernel");

__device__ __forceinline__ int64_t filter_offset(const FilterEntry& e, int64_t i) {
  if (e.dims <= 1) return i * e.stride[0];
  int64_t offset = 0;
#pragma unroll
  for (int d = 2; d > 0; --d) {
    if (d < e.dims) {
      const int64_t q = i / e.size[d];
      offset += (i - q * e.size[d]) * e.stride[d];
      i = q;
    }
  }
  return offset + i * e.stride[0];
}

template <typename T, int V, int U>
__device__ __forceinline__ double sum_squares(const FilterEntry& e, int64_t filter, int64_t i,
                                              int step) {
  using Acc = typename AccOf<T>::type;
  const T* data = static_cast<const T*>(e.data) + filter * e.filter_stride;
  const int64_t items = e.size[0] * e.size[1] * e.size[2];
  double total = 0.0;
  Acc sum = Acc(0);
  int chunk = 0;
  for (; i < items; i += static_cast<int64_t>(U) * step) {
    Item<T, V> w[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t at = i + static_cast<int64_t>(u) * step;
      if (at < items) w[u].load(data + filter_offset(e, at));
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (i + static_cast<int64_t>(u) * step < items) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const Acc v = w[u].get(j);
          sum += v * v;
        }
      }
    }
    chunk += U * V;
    if (chunk >= kChunk) {
      total += sum;
      sum = Acc(0);
      chunk = 0;
    }
  }
  return total + sum;
}

template <typename T>
__device__ __forceinline__ double sum_squares(const FilterEntry& e, int64_t filter, int64_t i,
                                              int step) {
  return e.vec > 1 ? sum_squares<T, 16 / static_cast<int>(sizeof(T)), 2>(e, filter, i, step)
                   : sum_squares<T, 1, 4>(e, filter, i, step);
}

__global__ void __launch_bounds__(kThreads, 3)
    filter_kernel(const __grid_constant__ FilterTable table) {
  IDAP_SHARED(double, buffer, kWarps);
  const int tid = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x);
  int low = 0, high = table.count;  // the last entry whose first block is not after this one
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.entries[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const FilterEntry& e = table.entries[low];
  const int64_t local = block - e.first_block;
  const int64_t filter = e.block_per_filter ? local : local * kWarps + tid / 32;
  double sum = 0.0;
  if (filter < e.filters) {
    const int first = e.block_per_filter ? tid : tid % 32;
    const int step = e.block_per_filter ? kThreads : 32;
    switch (static_cast<DType>(e.dtype)) {
      case DType::kFloat32:
        sum = sum_squares<float>(e, filter, first, step);
        break;
      case DType::kFloat64:
        sum = sum_squares<double>(e, filter, first, step);
        break;
      case DType::kFloat16:
        sum = sum_squares<Half>(e, filter, first, step);
        break;
      default:
        sum = sum_squares<BFloat>(e, filter, first, step);
    }
  }
  sum = lanes_sum(sum, 32);
  if (!e.block_per_filter) {
    if (filter < e.filters && tid % 32 == 0) e.out[filter] = root(sum);
    return;
  }
  if (tid % 32 == 0) buffer[tid / 32] = sum;
  __syncthreads();
  if (tid == 0) {
    for (int w = 1; w < kWarps; ++w) sum += buffer[w];
    e.out[filter] = root(sum);
  }
}

}  // namespace

int filter_table_size() { return kEntries; }

Status filter_norms(FilterEntry* entries, int count, void* stream) {
  for (int begin = 0; begin < count;) {
    FilterTable table;
    table.count = 0;
    int64_t blocks = 0;
    while (begin < count && table.count < kEntries) {
      FilterEntry& e = entries[begin];
      if (table.count > 0 && blocks + filter_blocks(e) > kMaxBlocks) break;
      e.first_block = static_cast<int32_t>(blocks);
      blocks += filter_blocks(e);
      table.entries[table.count++] = e;
      ++begin;
    }
    const auto kernel = filter_kernel;
    IDAP_LAUNCH(kernel, blocks, static_cast<cudaStream_t>(stream), table);
    const auto status = static_cast<Status>(cudaGetLastError());
    if (status != 0) return status;
  }
  return 0;
}

}  // namespace cuda
}  // namespace idap
