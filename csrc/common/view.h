// A strided tensor, seen as samples x channels x positions. Strides are in elements and may be
// zero or any size; nothing is ever copied to make a layout fit.
#pragma once

#include <cstdint>

#include "accumulator.h"

// The CPU kernels include this once per instruction set: no copy may be left for the linker to
// share.
#if defined(__GNUC__) || defined(__clang__)
#define IDAP_ALWAYS_INLINE __attribute__((always_inline))
#else
#define IDAP_ALWAYS_INLINE
#endif

namespace idap {

constexpr int kMaxPositionDims = 4;
constexpr int kMaxDims = 32;

struct View {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t samples = 1, sample_stride = 0;
  int64_t channels = 1, channel_stride = 0;
  // Position dimensions after merging, outermost (largest stride) first. dims == 0 means one
  // position. size[dims - 1] is the innermost run and stride[dims - 1] its step.
  int dims = 0;
  int64_t size[kMaxPositionDims] = {1, 1, 1, 1};
  int64_t stride[kMaxPositionDims] = {0, 0, 0, 0};

  IDAP_ALWAYS_INLINE int64_t positions() const {
    int64_t n = 1;
    for (int i = 0; i < dims; ++i) n *= size[i];
    return n;
  }
};

// Sorts dimensions by decreasing stride and merges those that step through memory as one.
// The statistics do not depend on the order of positions, so a transposed map merges as well
// as a plain one. Returns the number of dimensions left.
IDAP_ALWAYS_INLINE inline int merge_dims(int n, int64_t* size, int64_t* stride) {
  int m = 0;
  for (int i = 0; i < n; ++i) {  // drop dimensions of size one
    if (size[i] == 1) continue;
    size[m] = size[i];
    stride[m++] = stride[i];
  }
  for (int i = 1; i < m; ++i) {  // insertion sort, stable, m is small
    const int64_t sz = size[i], st = stride[i];
    int j = i;
    for (; j > 0 && stride[j - 1] < st; --j) {
      size[j] = size[j - 1];
      stride[j] = stride[j - 1];
    }
    size[j] = sz;
    stride[j] = st;
  }
  int k = 0;
  for (int i = 1; i < m; ++i) {
    if (stride[k] == stride[i] * size[i]) {
      size[k] *= size[i];
      stride[k] = stride[i];
    } else {
      ++k;
      size[k] = size[i];
      stride[k] = stride[i];
    }
  }
  return m == 0 ? 0 : k + 1;
}

// Builds the view of a tensor. sample_dim may be -1: then there is one sample.
// Returns false when more than kMaxPositionDims dimensions remain after merging.
IDAP_ALWAYS_INLINE inline bool make_view(const void* data, DType dtype, int ndim,
                                         const int64_t* size, const int64_t* stride,
                                         int channel_dim, int sample_dim, View* view) {
  View v;
  v.data = data;
  v.dtype = dtype;
  int64_t n[kMaxDims], s[kMaxDims];
  int m = 0;
  for (int i = 0; i < ndim; ++i) {
    if (i == channel_dim) {
      v.channels = size[i];
      v.channel_stride = stride[i];
    } else if (i == sample_dim) {
      v.samples = size[i];
      v.sample_stride = stride[i];
    } else {
      n[m] = size[i];
      s[m++] = stride[i];
    }
  }
  m = merge_dims(m, n, s);
  if (m > kMaxPositionDims) return false;
  v.dims = m;
  for (int i = 0; i < m; ++i) {
    v.size[i] = n[i];
    v.stride[i] = s[i];
  }
  *view = v;
  return true;
}

}  // namespace idap
