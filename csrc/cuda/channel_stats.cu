// The launchers of channel_stats and bn_act_stats: one launch, of the kernel that the plan names.
#include <limits>

#include "channel_kernels.h"

namespace idap {
namespace cuda {

namespace {

void fill(const View& view, const ChannelPlan& plan, Activation activation, bool accumulate,
          double* state, double* scratch, unsigned* tickets, ChannelArgs* out) {
  ChannelArgs& a = *out;
  a.data = view.data;
  a.samples = view.samples;
  a.sample_stride = view.sample_stride;
  a.channels = view.channels;
  a.channel_stride = view.channel_stride;
  a.positions = view.positions();
  a.walk =
      make_walk(view.dims, view.size, view.stride, plan.shape == Shape::kColumns ? 1 : plan.vec);
  a.lanes = plan.lanes;
  a.tile = plan.tile;
  a.split = plan.shape != Shape::kRows;
  a.tiles = static_cast<int>(plan.tiles);
  a.samples_per_block = plan.samples_per_block;
  a.sample_blocks = static_cast<int>(plan.sample_blocks);
  a.pieces = static_cast<int>(plan.pieces);
  a.piece = plan.piece;
  a.slices = static_cast<int>(plan.slices);
  a.group_samples = static_cast<int>(plan.group_samples);
  a.group_pieces = static_cast<int>(plan.group_pieces);
  a.groups_per_row = static_cast<int>(plan.groups_per_row);
  a.groups = static_cast<int>(plan.groups);
  a.records = scratch;
  a.group_records = scratch + plan.slices * plan.tiles * plan.tile * kQuantities;
  a.state = state;
  a.tickets = tickets;
  a.accumulate = accumulate;
  a.activation = static_cast<int>(activation);
}

}  // namespace

Status channel_stats(const View& view, const ChannelPlan& plan, Activation activation,
                     bool accumulate, double* state, double* scratch, unsigned* tickets,
                     void* stream) {
  ChannelArgs a;
  fill(view, plan, activation, accumulate, state, scratch, tickets, &a);
  return plan.shape == Shape::kColumns
             ? launch_channel_columns(a, view.dtype, plan.vec, plan.blocks, stream)
             : launch_channel_rows(a, view.dtype, plan.vec, plan.blocks, stream);
}

Status bn_act_stats(const View& view, const ChannelPlan& plan, const BatchNorm& norm,
                    Activation act, void* y, Activation activation, bool accumulate, double* state,
                    double* scratch, unsigned* tickets, void* stream) {
  BnActArgs a;
  fill(view, plan, activation, accumulate, state, scratch, tickets, &a);
  a.to_y = reinterpret_cast<intptr_t>(y) - reinterpret_cast<intptr_t>(view.data);
  a.mean = norm.mean;
  a.var = norm.var;
  a.weight = norm.weight;
  a.bias = norm.bias;
  a.parameters = static_cast<int>(norm.dtype);
  a.eps = static_cast<float>(norm.eps);
  a.act = static_cast<int>(act);
  const float infinite = std::numeric_limits<float>::infinity();
  a.bounds = act == Activation::kRelu || act == Activation::kIdentity || act == Activation::kRelu6;
  a.low = act == Activation::kIdentity ? -infinite : 0.0f;
  a.high = act == Activation::kRelu6 ? 6.0f : infinite;
  return plan.shape == Shape::kColumns
             ? launch_bn_act_columns(a, view.dtype, plan.vec, plan.blocks, stream)
             : launch_bn_act_rows(a, view.dtype, plan.vec, plan.blocks, stream);
}

}  // namespace cuda
}  // namespace idap
