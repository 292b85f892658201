// C functions around the launchers of csrc/cuda, for ctypes. They are compiled for the host
// together with the .cu files themselves; emulation.h runs the kernels.
#include "cuda/device.cuh"
#include "cuda/launchers.h"

using namespace idap;

namespace {

int finish_call(int status) { return status == 0 && emulation::state().error.empty() ? 0 : 3; }

bool view_of(const void* data, int dtype, int ndim, const int64_t* size, const int64_t* stride,
             int channel_dim, int sample_dim, View* view, cuda::ChannelPlan* plan,
             const void* y = nullptr) {
  return make_view(data, static_cast<DType>(dtype), ndim, size, stride, channel_dim, sample_dim,
                   view) &&
         cuda::plan_channel_stats(*view, plan, y);
}

}  // namespace

extern "C" {

// Every call: 0 done, 1 no plan, 2 workspace too small, 3 see emulation_error().

const char* emulation_error() { return emulation::state().error.c_str(); }

void emulation_reset(unsigned order) {
  emulation::State& s = emulation::state();
  s.order = order;
  s.error.clear();
  s.readable.clear();
  s.counts = nullptr;
  s.written = nullptr;
  s.written_bytes = 0;
  s.launches = 0;
}

void emulation_allow(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  emulation::state().readable.push_back({p, p + bytes});
}

void emulation_watch(const void* data, int64_t bytes, uint16_t* counts) {
  emulation::State& s = emulation::state();
  s.watched = static_cast<const char*>(data);
  s.watched_bytes = static_cast<size_t>(bytes);
  s.counts = counts;
}

void emulation_writable(const void* data, int64_t bytes, uint16_t* stores) {
  emulation::State& s = emulation::state();
  s.written = static_cast<const char*>(data);
  s.written_bytes = static_cast<size_t>(bytes);
  s.stores = stores;
}

int64_t emulation_launches() { return emulation::state().launches; }

int channel_plan(const void* data, int dtype, int ndim, const int64_t* size, const int64_t* stride,
                 int channel_dim, int sample_dim, const void* y, int64_t* out) {
  View view;
  cuda::ChannelPlan p;
  if (!view_of(data, dtype, ndim, size, stride, channel_dim, sample_dim, &view, &p, y)) return 1;
  const int64_t values[] = {static_cast<int64_t>(p.shape),
                            p.vec,
                            p.lanes,
                            p.tile,
                            p.tiles,
                            p.samples_per_block,
                            p.sample_blocks,
                            p.pieces,
                            p.piece,
                            p.slices,
                            p.group_samples,
                            p.group_pieces,
                            p.groups_per_row,
                            p.groups,
                            p.blocks,
                            p.tickets,
                            p.scratch,
                            view.samples,
                            view.channels,
                            view.positions()};
  std::copy(std::begin(values), std::end(values), out);
  return 0;
}

int channel_stats(const void* data, int dtype, int ndim, const int64_t* size, const int64_t* stride,
                  int channel_dim, int sample_dim, int activation, int accumulate, double* state,
                  double* scratch, int64_t scratch_bytes, unsigned* tickets, int64_t ticket_count) {
  View view;
  cuda::ChannelPlan plan;
  if (!view_of(data, dtype, ndim, size, stride, channel_dim, sample_dim, &view, &plan)) return 1;
  if (plan.scratch > scratch_bytes || plan.tickets > ticket_count) return 2;
  return finish_call(cuda::channel_stats(view, plan, static_cast<Activation>(activation),
                                         accumulate != 0, state, scratch, tickets, nullptr));
}

// parameters: mean, var, weight, bias; the last two may be null.
int bn_act_stats(const void* data, int dtype, int ndim, const int64_t* size, const int64_t* stride,
                 int channel_dim, int sample_dim, int activation, int accumulate, double* state,
                 void* y, const void* const* parameters, int parameter_dtype, double eps, int act,
                 double* scratch, int64_t scratch_bytes, unsigned* tickets, int64_t ticket_count) {
  View view;
  cuda::ChannelPlan plan;
  if (!view_of(data, dtype, ndim, size, stride, channel_dim, sample_dim, &view, &plan, y)) return 1;
  if (plan.scratch > scratch_bytes || plan.tickets > ticket_count) return 2;
  const cuda::BatchNorm norm = {parameters[0],
                                parameters[1],
                                parameters[2],
                                parameters[3],
                                static_cast<DType>(parameter_dtype),
                                eps};
  return finish_call(cuda::bn_act_stats(view, plan, norm, static_cast<Activation>(act), y,
                                        static_cast<Activation>(activation), accumulate != 0, state,
                                        scratch, tickets, nullptr));
}

int pair_plan(const void* x, const void* y, int dtype, int ndim, const int64_t* size,
              const int64_t* sx, const int64_t* sy, int row_dims, int64_t* out) {
  cuda::PairView view;
  cuda::PairPlan p;
  if (!cuda::make_pair_view(x, y, static_cast<DType>(dtype), ndim, size, sx, sy, row_dims, &view) ||
      !cuda::plan_pair_stats(view, &p)) {
    return 1;
  }
  const int64_t values[] = {p.vec,     p.lanes,   p.pieces,    p.piece,        p.blocks,
                            p.tickets, p.scratch, view.rows(), view.elements()};
  std::copy(std::begin(values), std::end(values), out);
  return 0;
}

int pair_stats(const void* x, const void* y, int dtype, int ndim, const int64_t* size,
               const int64_t* sx, const int64_t* sy, int row_dims, double* out, double* scratch,
               int64_t scratch_bytes, unsigned* tickets, int64_t ticket_count) {
  cuda::PairView view;
  cuda::PairPlan plan;
  if (!cuda::make_pair_view(x, y, static_cast<DType>(dtype), ndim, size, sx, sy, row_dims, &view) ||
      !cuda::plan_pair_stats(view, &plan)) {
    return 1;
  }
  if (plan.scratch > scratch_bytes || plan.tickets > ticket_count) return 2;
  return finish_call(cuda::pair_stats(view, plan, out, scratch, tickets, nullptr));
}

// Arrays of `count` weights; sizes and strides are rows of six.
int filter_norms(int count, const void* const* data, const int* dtype, const int* ndim,
                 const int64_t* size, const int64_t* stride, const int* dim, double* const* out) {
  std::vector<cuda::FilterEntry> entries(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    if (!cuda::make_filter_entry(data[i], static_cast<DType>(dtype[i]), ndim[i], size + 6 * i,
                                 stride + 6 * i, dim[i], &entries[static_cast<size_t>(i)])) {
      return 1;
    }
    entries[static_cast<size_t>(i)].out = out[i];
  }
  return finish_call(cuda::filter_norms(entries.data(), count, nullptr));
}

int filter_table() { return cuda::filter_table_size(); }

// n / d by the multiplication that the kernels use.
uint32_t fast_divide(uint32_t n, int64_t d) { return cuda::divide(n, cuda::make_fast_div(d)); }

}  // extern "C"
