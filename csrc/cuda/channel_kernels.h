// The kernels over channels, as their launcher sees them. float64 has none that writes.
#pragma once

#include "launchers.h"
#include "records.cuh"

namespace idap {
namespace cuda {

struct BnActArgs : ChannelArgs {
  int64_t to_y;  // bytes from any element of x to its element of y
  const void *mean, *var, *weight, *bias;
  int parameters;  // their DType
  float eps;
  int act;
  // relu, identity and relu6 alike bound the normalized value.
  int bounds;
  float low, high;
};

Status launch_channel_rows(const ChannelArgs& args, DType dtype, int vec, int64_t blocks,
                           void* stream);
Status launch_channel_columns(const ChannelArgs& args, DType dtype, int vec, int64_t blocks,
                              void* stream);
Status launch_bn_act_rows(const BnActArgs& args, DType dtype, int vec, int64_t blocks,
                          void* stream);
Status launch_bn_act_columns(const BnActArgs& args, DType dtype, int vec, int64_t blocks,
                             void* stream);

}  // namespace cuda
}  // namespace idap
