// What the CPU kernels of one instruction set offer, and the choice among the sets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/view.h"

namespace idap {

// Two tensors of one shape, as rows x reduced positions; the dimensions of the first tensor
// decide the order. Strides in elements.
struct PairView {
  const void* x = nullptr;
  const void* y = nullptr;
  DType dtype = DType::kFloat32;
  int row_dims = 0;
  int64_t rows = 1, row_size[kMaxDims] = {}, x_row_stride[kMaxDims] = {},
          y_row_stride[kMaxDims] = {};
  int dims = 0;  // reduced dimensions after merging, outermost first
  int64_t size[kMaxDims] = {}, x_stride[kMaxDims] = {}, y_stride[kMaxDims] = {};

  IDAP_ALWAYS_INLINE int64_t positions() const {
    int64_t n = 1;
    for (int i = 0; i < dims; ++i) n *= size[i];
    return n;
  }
};

// What is written beside the statistics: act((x - mean) * weight / sqrt(var + eps) + bias).
// y has the view's dtype, sizes and strides, in other memory; the view does not overlap itself.
struct NormAct {
  void* y = nullptr;
  Activation act = Activation::kIdentity;
  DType dtype = DType::kFloat32;  // of the parameters, one for each channel
  const void *mean = nullptr, *var = nullptr;
  const void *weight = nullptr, *bias = nullptr;  // nullptr: ones, zeros
  double eps = 0.0;
};

struct Kernels {
  const char* isa;
  // float64 values of scratch memory that channel_stats needs for this view.
  size_t (*channel_stats_scratch)(const View&);
  // state: kRows x channels. With accumulate, the state is merged into, else overwritten. With
  // norm_act, its y is written in the same pass; the statistics stay those of the view.
  void (*channel_stats)(const View&, Activation, bool accumulate, double* scratch, double* state,
                        int threads, const NormAct* norm_act);
  size_t (*pair_stats_scratch)(const PairView&);
  // out: kPairRows x rows.
  void (*pair_stats)(const PairView&, double* scratch, double* out, int threads);
  // Writes views[i].channels norms to out[i] for each i < n.
  void (*filter_norms)(const View* views, double* const* out, int n, int threads);
  // Reads the memory and returns the sum of its 32-bit words.
  uint64_t (*read_memory)(const void* data, size_t bytes, int threads);
};

// Each instruction set's table; the ones that were not compiled in give nullptr.
const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

}  // namespace idap
