// The launchers: plain host functions around the kernels. Each takes memory of the caller, launches
// on the caller's stream, never synchronises and never allocates. A stream is a cudaStream_t, here
// a void* so that a caller needs no CUDA header.
#pragma once

#include <cstdint>

#include "plan.h"

namespace idap {
namespace cuda {

// A CUDA error code, 0 for success.
using Status = int;

// state: device, float64 (11, channels). Merged into if `accumulate`, else overwritten. scratch and
// tickets: device memory of at least plan.scratch bytes and plan.tickets uint32; tickets are zero
// before the first launch that gets them, and zero again after each.
Status channel_stats(const View& view, const ChannelPlan& plan, Activation activation,
                     bool accumulate, double* state, double* scratch, unsigned* tickets,
                     void* stream);

// The parameters of a batch norm in evaluation mode, all of them on the device, (channels,),
// contiguous and of one dtype. weight and bias may be null: ones, zeros.
struct BatchNorm {
  const void *mean, *var, *weight, *bias;
  DType dtype;
  double eps;
};

// y = act((x - mean) * weight / sqrt(var + eps) + bias), with the strides of x, and the statistics
// of x as channel_stats. The plan was made for both pointers. Not for float64.
Status bn_act_stats(const View& view, const ChannelPlan& plan, const BatchNorm& norm,
                    Activation act, void* y, Activation activation, bool accumulate, double* state,
                    double* scratch, unsigned* tickets, void* stream);

// out: device, float64 (4, rows).
Status pair_stats(const PairView& view, const PairPlan& plan, double* out, double* scratch,
                  unsigned* tickets, void* stream);

// Layers that one launch takes: the table travels as a kernel parameter, by value, so that neither
// a copy nor its lifetime is anybody's concern and a CUDA graph keeps it.
int filter_table_size();

// Sets first_block of the entries and launches once for every filter_table_size() of them.
Status filter_norms(FilterEntry* entries, int count, void* stream);

// ------------------------------------------------------------------------------------- runtime

struct DeviceInfo {
  int major = 0, minor = 0;
  char name[256] = {};
};

Status set_device(int device, int* previous);
Status device_count(int* count);
Status driver_version(int* version);   // 0: no driver
Status runtime_version(int* version);  // the one linked in
Status device_info(int device, DeviceInfo* info);
// Whether the binary holds code that this device can run: 0, or the error of the loader.
Status kernels_load(int device);
const char* error_name(Status status);
const char* error_text(Status status);

}  // namespace cuda
}  // namespace idap
