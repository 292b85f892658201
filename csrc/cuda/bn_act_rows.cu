// The kernels of bn_act_stats along rows.
#include "bn_act.cuh"
#include "channel_rows.cuh"

namespace idap {
namespace cuda {

Status launch_bn_act_rows(const BnActArgs& args, DType dtype, int vec, int64_t blocks,
                          void* stream) {
  switch (dtype) {
    case DType::kFloat32:
      return launch_rows_of<BnActOfRow, float>(args, vec, blocks, stream);
    case DType::kFloat16:
      return launch_rows_of<BnActOfRow, Half>(args, vec, blocks, stream);
    default:
      return launch_rows_of<BnActOfRow, BFloat>(args, vec, blocks, stream);
  }
}

}  // namespace cuda
}  // namespace idap
