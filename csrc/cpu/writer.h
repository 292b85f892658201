// The map that bn_act_stats writes beside the statistics: y = act((x - mean) * scale + bias), with
// scale = weight / sqrt(var + eps). channel_stats calls it for each block it has accumulated, so x
// is read from cache.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace idap {
namespace IDAP_ISA {

struct Writer {
  const char* x;
  char* y;
  const void* parameters;  // mean, scale, bias: three rows of accumulation type
  int64_t pitch;           // of such a row
  bool streams;            // y goes past the caches: fence_streams() after the last call
  // At `at` in x, the first element of `channel`: rows of n positions, one for each of `channels`
  // channels.
  void (*rows)(const Writer&, const void* at, int64_t channel_stride, int64_t stride, int64_t n,
               int64_t channel, int64_t channels);
  // The same for n positions at offsets[i].
  void (*columns)(const Writer&, const void* at, const int64_t* offsets, int64_t channel_stride,
                  int64_t n, int64_t channel, int64_t channels);
};

// float64 values of scratch memory for the parameters of a map with that many channels.
size_t writer_scratch(int64_t channels);
Writer make_writer(const View&, const NormAct&, double* scratch);

}  // namespace IDAP_ISA
}  // namespace idap
