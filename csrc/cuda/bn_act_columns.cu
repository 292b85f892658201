// The kernels of bn_act_stats across neighbouring channels.
#include "bn_act.cuh"
#include "channel_columns.cuh"

namespace idap {
namespace cuda {

Status launch_bn_act_columns(const BnActArgs& args, DType dtype, int vec, int64_t blocks,
                             void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_columns_of<BnActOfTile, float>(args, vec, blocks, stream);
    case DType::kFloat16:
      return launch_columns_of<BnActOfTile, Half>(args, vec, blocks, stream);
    default:
      return launch_columns_of<BnActOfTile, BFloat>(args, vec, blocks, stream);
  }
}

}  // namespace cuda
}  // namespace idap
