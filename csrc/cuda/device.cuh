// What the kernels share: reading elements, the activations, sums over threads. The same text also
// compiles as plain C++ with tests/kernels/cuda_emulation/emulation.h, which runs every thread of a
// block on the host.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define IDAP_SHARED(type, name, count) __shared__ type name[count]
#define IDAP_LAUNCH(kernel, blocks, stream, ...) \
  kernel<<<static_cast<unsigned>(blocks), ::idap::cuda::kThreads, 0, stream>>>(__VA_ARGS__)
#else
#include "emulation.h"
#endif

#include "plan.h"

namespace idap {
namespace cuda {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// Halves are summed in float, doubles in double.
template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

template <int Bytes>
struct RawOf;
template <>
struct RawOf<2> {
  using type = unsigned short;
};
template <>
struct RawOf<4> {
  using type = unsigned int;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<16> {
  using type = uint4;
};

__device__ __forceinline__ unsigned word(unsigned short r, int) { return r; }
__device__ __forceinline__ unsigned word(unsigned int r, int) { return r; }
__device__ __forceinline__ unsigned word(uint2 r, int i) { return i == 0 ? r.x : r.y; }
__device__ __forceinline__ unsigned word(uint4 r, int i) {
  return i == 0 ? r.x : (i == 1 ? r.y : (i == 2 ? r.z : r.w));
}

// One load of V elements at once; the address is a multiple of its size.
template <typename T, int V>
struct Item {
  using Acc = typename AccOf<T>::type;
  using Raw = typename RawOf<static_cast<int>(sizeof(T)) * V>::type;
  Raw raw;

  __device__ __forceinline__ void load(const T* p) { raw = __ldg(reinterpret_cast<const Raw*>(p)); }
  __device__ __forceinline__ Acc get(int i) const {
    return decode(static_cast<const T*>(nullptr), i);
  }

 private:
  __device__ __forceinline__ float decode(const float*, int i) const {
    return __uint_as_float(word(raw, i));
  }
  __device__ __forceinline__ double decode(const double*, int i) const {
    return __hiloint2double(static_cast<int>(word(raw, 2 * i + 1)),
                            static_cast<int>(word(raw, 2 * i)));
  }
  __device__ __forceinline__ float decode(const BFloat*, int i) const {
    const unsigned w = word(raw, i / 2);
    return __uint_as_float(i % 2 == 0 ? w << 16 : w & 0xffff0000u);
  }
  __device__ __forceinline__ float decode(const Half*, int i) const {
    const unsigned w = word(raw, i / 2);
    return __half2float(
        __ushort_as_half(static_cast<unsigned short>(i % 2 == 0 ? w & 0xffffu : w >> 16)));
  }
};

__device__ __forceinline__ float activate(float y, int kind) {
  if (kind == static_cast<int>(Activation::kRelu)) return fmaxf(y, 0.0f);
  if (kind == static_cast<int>(Activation::kIdentity)) return y;
  if (kind == static_cast<int>(Activation::kGelu))
    return 0.5f * y * (1.0f + erff(y * 0.70710678118654752f));
  return y / (1.0f + expf(-y));
}

__device__ __forceinline__ double activate(double y, int kind) {
  if (kind == static_cast<int>(Activation::kRelu)) return fmax(y, 0.0);
  if (kind == static_cast<int>(Activation::kIdentity)) return y;
  if (kind == static_cast<int>(Activation::kGelu))
    return 0.5 * y * (1.0 + erf(y * 0.70710678118654752));
  return y / (1.0 + exp(-y));
}

__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ double smaller(double a, double b) { return fmin(a, b); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float magnitude(float a) { return fabsf(a); }
__device__ __forceinline__ double magnitude(double a) { return fabs(a); }
__device__ __forceinline__ float root(float a) { return sqrtf(a); }
__device__ __forceinline__ double root(double a) { return sqrt(a); }

template <typename A>
__device__ __forceinline__ A infinity();
template <>
__device__ __forceinline__ float infinity<float>() {
  return __uint_as_float(0x7f800000u);
}
template <>
__device__ __forceinline__ double infinity<double>() {
  return __hiloint2double(0x7ff00000, 0);
}

template <typename A>
__device__ __forceinline__ bool finite(A a) {
  return magnitude(a) < infinity<A>();  // false for NaN
}

// Sum over `lanes` neighbouring threads (a power of two, at most 32), the same bits in each of
// them. Every thread of the warp takes part.
template <typename A>
__device__ __forceinline__ A lanes_sum(A v, int lanes) {
  for (int o = lanes >> 1; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}
template <typename A>
__device__ __forceinline__ A lanes_min(A v, int lanes) {
  for (int o = lanes >> 1; o > 0; o >>= 1) v = smaller(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}
template <typename A>
__device__ __forceinline__ A lanes_max(A v, int lanes) {
  for (int o = lanes >> 1; o > 0; o >>= 1) v = larger(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}

__device__ __forceinline__ uint32_t divide(uint32_t n, const FastDiv& d) {
  return d.magic ? __umulhi(n, d.magic) >> d.shift : n;
}

// Offset of item i of a row, in elements. dims <= 1 is the caller's fast path.
__device__ __forceinline__ int64_t item_offset(const Walk& w, int64_t i) {
  if (w.dims <= 1) return i * w.stride[0];
  int64_t offset = 0;
  if (w.wide) {
#pragma unroll
    for (int d = kMaxPositionDims - 1; d > 0; --d) {
      if (d < w.dims) {
        const int64_t q = i / w.size[d];
        offset += (i - q * w.size[d]) * w.stride[d];
        i = q;
      }
    }
    return offset + i * w.stride[0];
  }
  uint32_t n = static_cast<uint32_t>(i);
#pragma unroll
  for (int d = kMaxPositionDims - 1; d > 0; --d) {
    if (d < w.dims) {
      const uint32_t q = divide(n, w.div[d]);
      offset += static_cast<int64_t>(n - q * w.div[d].divisor) * w.stride[d];
      n = q;
    }
  }
  return offset + static_cast<int64_t>(n) * w.stride[0];
}

// Tells the last of `blocks` blocks that took the ticket; the others have nothing left to do. What
// any of them wrote to global memory before is then visible to the last one. The counter wraps to
// zero by itself, so the next launch (or the next replay of a CUDA graph) finds it as it was.
__device__ __forceinline__ bool last_block(unsigned* ticket, unsigned blocks) {
  IDAP_SHARED(int, last, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomicInc(ticket, blocks - 1) == blocks - 1;
  __syncthreads();
  const bool mine = last[0] != 0;
  __threadfence();
  return mine;
}

}  // namespace cuda
}  // namespace idap
