// What a kernel over channels does with an item besides adding it up. channel_stats: nothing.
#pragma once

#include "channel_kernels.h"

namespace idap {
namespace cuda {

struct NoWrite {
  using Args = ChannelArgs;
  static constexpr bool kWrites = false;

  // The activation of the statistics, other than ReLU.
  template <typename A>
  static __device__ __forceinline__ A statistic(A y, int kind) {
    return activate(y, kind);
  }

  template <typename... Any>
  __device__ __forceinline__ void begin(const Any&...) {}

  // Of item i of a row that is not one run.
  static __device__ __forceinline__ int64_t offset(const Walk& walk, int64_t i) {
    return item_offset(walk, i);
  }

  template <typename T, int V>
  static __device__ __forceinline__ void load(Item<T, V>& item, const T* p) {
    item.load(p);
  }
};

}  // namespace cuda
}  // namespace idap
