// bn_act_stats: batch norm and activation of the items that the statistics have just taken, in the
// registers that hold them, and a store of the same width to the same offset of y. x is read for
// the last time, y will be read next: loads are marked as the first to leave the caches, stores are
// not.
#pragma once

#include <cstring>

#include "channel_kernels.h"

namespace idap {
namespace cuda {

// Both halves of a word; rounded to nearest, ties to even.
__device__ __forceinline__ unsigned pack(float low, float high, const Half*) {
  const auto pair = __floats2half2_rn(low, high);
  unsigned bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ __forceinline__ unsigned pack(float low, float high, const BFloat*) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
#else
  const auto round = [](float f) {
    const unsigned bits = __float_as_uint(f);
    return f != f ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  };
  return round(high) << 16 | round(low);
#endif
}

__device__ __forceinline__ void set_word(unsigned short& r, int, unsigned w) {
  r = static_cast<unsigned short>(w);
}
__device__ __forceinline__ void set_word(unsigned int& r, int, unsigned w) { r = w; }
__device__ __forceinline__ void set_word(uint2& r, int i, unsigned w) { (i == 0 ? r.x : r.y) = w; }
__device__ __forceinline__ void set_word(uint4& r, int i, unsigned w) {
  (i == 0 ? r.x : (i == 1 ? r.y : (i == 2 ? r.z : r.w))) = w;
}

// item[i] = f(item[i], i) for all of an item.
template <int V, typename F>
__device__ __forceinline__ void map(Item<float, V>& item, const F& f) {
#pragma unroll
  for (int i = 0; i < V; ++i) set_word(item.raw, i, __float_as_uint(f(item.get(i), i)));
}
template <typename T, int V, typename F>
__device__ __forceinline__ void map(Item<T, V>& item, const F& f) {
  const T* type = nullptr;
  if constexpr (V == 1) {
    set_word(item.raw, 0, pack(f(item.get(0), 0), 0.0f, type));
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 2)
      set_word(item.raw, i / 2, pack(f(item.get(i), i), f(item.get(i + 1), i + 1), type));
  }
}

// n = (x - center) * scale + shift
struct Affine {
  float center = 0, scale = 0, shift = 0;
  __device__ __forceinline__ float operator()(float x) const {
    return (x - center) * scale + shift;
  }
};

template <typename T>
__device__ __forceinline__ float parameter_as(const void* p, int64_t channel) {
  return static_cast<float>(element(static_cast<const T*>(p) + channel));
}

__device__ __forceinline__ float parameter(const BnActArgs& a, const void* p, int64_t channel) {
  switch (static_cast<DType>(a.parameters)) {
    case DType::kFloat32:
      return parameter_as<float>(p, channel);
    case DType::kFloat64:
      return parameter_as<double>(p, channel);
    case DType::kFloat16:
      return parameter_as<Half>(p, channel);
    default:
      return parameter_as<BFloat>(p, channel);
  }
}

__device__ __forceinline__ Affine affine_of(const BnActArgs& a, int64_t channel) {
  Affine n;
  n.center = parameter(a, a.mean, channel);
  n.scale = (a.weight ? parameter(a, a.weight, channel) : 1.0f) /
            root(parameter(a, a.var, channel) + a.eps);
  n.shift = a.bias ? parameter(a, a.bias, channel) : 0.0f;
  return n;
}

// The activation of the stored value. Unlike the one of the statistics, which have their own way to
// tell a NaN, it keeps them: a comparison with NaN is false.
__device__ __forceinline__ float bounded(const BnActArgs& a, float n) {
  n = n < a.low ? a.low : n;
  return n > a.high ? a.high : n;
}

// The long activations are called: copies of them in every loop would double the time to compile.
template <typename A>
__device__ __noinline__ A curve(A y, int kind) {
  return activate(y, kind);
}

template <typename T, int V, typename Of>
__device__ __noinline__ Item<T, V> curve_item(Item<T, V> item, Of affine, int act) {
  const bool hard = act == static_cast<int>(Activation::kHardswish);
  map(item, [=](float x, int i) {
    const float n = affine(i)(x);
    return hard ? n * smaller(larger(n + 3.0f, 0.0f), 6.0f) / 6.0f : activate(n, act);
  });
  return item;
}

struct BnAct {
  using Args = BnActArgs;
  static constexpr bool kWrites = true;

  static __device__ __forceinline__ float statistic(float y, int kind) { return curve(y, kind); }

  // Dense maps are one run almost always: a loop, since every load and every store has a copy.
  static __device__ __forceinline__ int64_t offset(const Walk& walk, int64_t i) {
    int64_t offset = 0;
#pragma unroll 1
    for (int d = walk.dims - 1; d > 0; --d) {
      const int64_t q =
          walk.wide ? i / walk.size[d] : divide(static_cast<uint32_t>(i), walk.div[d]);
      offset += (i - q * walk.size[d]) * walk.stride[d];
      i = q;
    }
    return offset + i * walk.stride[0];
  }

  template <typename T, int V>
  static __device__ __forceinline__ void load(Item<T, V>& item, const T* p) {
    item.raw = __ldcs(reinterpret_cast<const typename Item<T, V>::Raw*>(p));
  }

  // `from` is where the item was read.
  template <typename T, int V>
  static __device__ __forceinline__ void store(const Args& a, const Item<T, V>& item,
                                               const T* from) {
    using Raw = typename Item<T, V>::Raw;
    __stwb(reinterpret_cast<Raw*>(reinterpret_cast<intptr_t>(from) + a.to_y), item.raw);
  }

 protected:
  // affine(i): of element i of an item.
  template <typename T, int V, int U, typename Has, typename Of>
  static __device__ __forceinline__ void apply_all(const Args& a, Item<T, V> (&items)[U],
                                                   const Has& has, const Of& affine) {
    if (a.bounds) {
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (has(u)) map(items[u], [&](float x, int i) { return bounded(a, affine(i)(x)); });
      }
    } else {
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (has(u)) items[u] = curve_item(items[u], affine, a.act);
      }
    }
  }
};

// A thread stays with one channel, whose parameters lie in slots of its column of the buffer that
// are free until the end: three registers less.
struct BnActOfRow : BnAct {
  __device__ __forceinline__ void begin(const Args& a, double* column, int64_t channel) {
    const Affine n = affine_of(a, channel);
    first_ = reinterpret_cast<float*>(column + kLow * kThreads);
    first_[0] = n.center;
    first_[1] = n.scale;
    first_[kThird] = n.shift;
  }

  template <typename T, int V, int U, typename Has>
  __device__ __forceinline__ void apply(const Args& a, Item<T, V> (&items)[U],
                                        const Has& has) const {
    Affine n;
    n.center = first_[0];
    n.scale = first_[1];
    n.shift = first_[kThird];
    apply_all(a, items, has, [n](int) { return n; });
  }

 private:
  static constexpr int kThird = 2 * (kHigh - kLow) * kThreads;
  float* first_;
};

// Threads share a tile of channels: its parameters lie in shared memory, since those of V channels
// would cost each of them 3 V registers.
struct BnActOfTile : BnAct {
  __device__ __forceinline__ void begin(const Args& a, double* buffer, int64_t first, int mine) {
    float* all = reinterpret_cast<float*>(buffer);
    const int t = static_cast<int>(threadIdx.x);
    if (t < a.tile && first + t < a.channels) {
      const Affine n = affine_of(a, first + t);
      all[t] = n.center;
      all[kTile + t] = n.scale;
      all[2 * kTile + t] = n.shift;
    }
    __syncthreads();
    mine_ = all + mine;
  }

  template <typename T, int V, int U, typename Has>
  __device__ __forceinline__ void apply(const Args& a, Item<T, V> (&items)[U],
                                        const Has& has) const {
    apply_all(a, items, has, [mine_ = mine_](int i) {
      Affine n;
      n.center = mine_[i];
      n.scale = mine_[kTile + i];
      n.shift = mine_[2 * kTile + i];
      return n;
    });
  }

 private:
  static constexpr int kTile = 32;  // the widest of a plan
  const float* mine_;
};

}  // namespace cuda
}  // namespace idap
