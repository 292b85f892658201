// The kernels of channel_stats along rows.
#include "channel_rows.cuh"

namespace idap {
namespace cuda {

Status launch_channel_rows(const ChannelArgs& args, DType dtype, int vec, int64_t blocks,
                           void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_rows_of<NoWrite, float>(args, vec, blocks, stream);
    case DType::kFloat64:
      return launch_rows_of<NoWrite, double>(args, vec, blocks, stream);
    case DType::kFloat16:
      return launch_rows_of<NoWrite, Half>(args, vec, blocks, stream);
    default:
      return launch_rows_of<NoWrite, BFloat>(args, vec, blocks, stream);
  }
}

}  // namespace cuda
}  // namespace idap
