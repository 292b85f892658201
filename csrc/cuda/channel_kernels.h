// The two kernels of channel_stats, as its launcher sees them.
#pragma once

#include "launchers.h"
#include "records.cuh"

namespace idap {
namespace cuda {

Status launch_channel_rows(const ChannelArgs& args, DType dtype, int vec, int64_t blocks,
                           void* stream);
Status launch_channel_columns(const ChannelArgs& args, DType dtype, int vec, int64_t blocks,
                              void* stream);

}  // namespace cuda
}  // namespace idap
