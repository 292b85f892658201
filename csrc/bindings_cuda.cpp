// idap_kernels._cuda: raw pointers, sizes, strides and a stream in; nothing of torch. It needs no
// CUDA header and loads on machines without a driver. Arguments were checked in Python; what is
// checked here guards memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launchers.h"

namespace py = pybind11;
using namespace idap;

#ifndef IDAP_CUDA_ARCHS
#error "define IDAP_CUDA_ARCHS as the architectures that the kernels are compiled for"
#endif

namespace {

void check(const char* call, cuda::Status status) {
  if (status == 0) return;
  throw std::runtime_error(std::string(call) + ": " + cuda::error_name(status) + ": " +
                           cuda::error_text(status));
}

// Makes a device current for one call.
class DeviceGuard {
 public:
  DeviceGuard(const char* call, int device) : device_(device) {
    check(call, cuda::set_device(device, &previous_));
  }
  ~DeviceGuard() {
    int ignored = 0;
    if (previous_ != device_) cuda::set_device(previous_, &ignored);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

int read_ints(const py::tuple& t, int64_t* out) {
  if (t.size() > static_cast<size_t>(kMaxDims)) throw py::value_error("too many dimensions");
  int n = 0;
  for (const auto& item : t) out[n++] = py::cast<int64_t>(item);
  return n;
}

DType read_dtype(int dtype) {
  if (dtype < 0 || dtype > 3) throw py::value_error("unknown dtype code");
  return static_cast<DType>(dtype);
}

View view_of(uintptr_t data, int dtype, const py::tuple& sizes, const py::tuple& strides,
             int channel_dim, int sample_dim) {
  int64_t size[kMaxDims], stride[kMaxDims];
  const int n = read_ints(sizes, size);
  if (read_ints(strides, stride) != n) throw py::value_error("sizes and strides differ in length");
  View v;
  if (!make_view(pointer<const void>(data), read_dtype(dtype), n, size, stride, channel_dim,
                 sample_dim, &v)) {
    throw py::value_error("more than 4 position dimensions remain after merging");
  }
  return v;
}

// Lends the caller's workspace to a call. A workspace that is too small is an answer, not an error:
// (scratch bytes, tickets) wanted, and nothing was launched. None: done.
py::object lend(int64_t scratch_wanted, int64_t tickets_wanted, int64_t scratch_bytes,
                int64_t tickets) {
  if (scratch_wanted <= scratch_bytes && tickets_wanted <= tickets) return py::none();
  return py::make_tuple(scratch_wanted, tickets_wanted);
}

py::object channel_stats(uintptr_t data, int dtype, const py::tuple& sizes,
                         const py::tuple& strides, int channel_dim, int sample_dim, int activation,
                         bool accumulate, uintptr_t state, uintptr_t scratch, int64_t scratch_bytes,
                         uintptr_t tickets, int64_t ticket_count, int device, uintptr_t stream) {
  if (activation < 0 || activation > 3) throw py::value_error("unknown activation code");
  const View view = view_of(data, dtype, sizes, strides, channel_dim, sample_dim);
  cuda::ChannelPlan plan;
  if (!cuda::plan_channel_stats(view, &plan))
    throw py::value_error("channel_stats: the tensor is empty or too large");
  py::object wanted = lend(plan.scratch, plan.tickets, scratch_bytes, ticket_count);
  if (!wanted.is_none()) return wanted;
  py::gil_scoped_release release;
  DeviceGuard guard("channel_stats", device);
  check("channel_stats",
        cuda::channel_stats(view, plan, static_cast<Activation>(activation), accumulate,
                            pointer<double>(state), pointer<double>(scratch),
                            pointer<unsigned>(tickets), pointer<void>(stream)));
  return wanted;
}

py::object bn_act_stats(uintptr_t data, int dtype, const py::tuple& sizes, const py::tuple& strides,
                        int channel_dim, int sample_dim, int activation, bool accumulate,
                        uintptr_t state, uintptr_t y, uintptr_t mean, uintptr_t var,
                        uintptr_t weight, uintptr_t bias, int parameters, double eps, int act,
                        uintptr_t scratch, int64_t scratch_bytes, uintptr_t tickets,
                        int64_t ticket_count, int device, uintptr_t stream) {
  if (activation < 0 || activation > 3 || act < 0 || act > 5)
    throw py::value_error("unknown activation code");
  const View view = view_of(data, dtype, sizes, strides, channel_dim, sample_dim);
  if (view.dtype == DType::kFloat64) throw py::value_error("bn_act_stats: no kernel for float64");
  cuda::ChannelPlan plan;
  if (!cuda::plan_channel_stats(view, &plan, pointer<void>(y)))
    throw py::value_error("bn_act_stats: the tensor is empty or too large");
  py::object wanted = lend(plan.scratch, plan.tickets, scratch_bytes, ticket_count);
  if (!wanted.is_none()) return wanted;
  const cuda::BatchNorm norm = {pointer<const void>(mean),   pointer<const void>(var),
                                pointer<const void>(weight), pointer<const void>(bias),
                                read_dtype(parameters),      eps};
  py::gil_scoped_release release;
  DeviceGuard guard("bn_act_stats", device);
  check("bn_act_stats",
        cuda::bn_act_stats(view, plan, norm, static_cast<Activation>(act), pointer<void>(y),
                           static_cast<Activation>(activation), accumulate, pointer<double>(state),
                           pointer<double>(scratch), pointer<unsigned>(tickets),
                           pointer<void>(stream)));
  return wanted;
}

py::object pair_stats(uintptr_t x, uintptr_t y, int dtype, const py::tuple& sizes,
                      const py::tuple& x_strides, const py::tuple& y_strides, int row_dims,
                      uintptr_t out, uintptr_t scratch, int64_t scratch_bytes, uintptr_t tickets,
                      int64_t ticket_count, int device, uintptr_t stream) {
  int64_t size[kMaxDims], sx[kMaxDims], sy[kMaxDims];
  const int n = read_ints(sizes, size);
  if (read_ints(x_strides, sx) != n || read_ints(y_strides, sy) != n) {
    throw py::value_error("sizes and strides differ in length");
  }
  cuda::PairView view;
  if (!cuda::make_pair_view(pointer<const void>(x), pointer<const void>(y), read_dtype(dtype), n,
                            size, sx, sy, row_dims, &view)) {
    throw py::value_error("pair_stats: more than 6 dimensions remain after merging");
  }
  cuda::PairPlan plan;
  if (!cuda::plan_pair_stats(view, &plan))
    throw py::value_error("pair_stats: the tensors are empty or too large");
  py::object wanted = lend(plan.scratch, plan.tickets, scratch_bytes, ticket_count);
  if (!wanted.is_none()) return wanted;
  py::gil_scoped_release release;
  DeviceGuard guard("pair_stats", device);
  check("pair_stats", cuda::pair_stats(view, plan, pointer<double>(out), pointer<double>(scratch),
                                       pointer<unsigned>(tickets), pointer<void>(stream)));
  return wanted;
}

// table: (data, dtype, sizes, strides, dim, out) for each weight.
void filter_norms(const py::list& table, int device, uintptr_t stream) {
  std::vector<cuda::FilterEntry> entries;
  entries.reserve(table.size());
  for (const auto& item : table) {
    const auto t = py::cast<py::tuple>(item);
    int64_t size[kMaxDims], stride[kMaxDims];
    const int n = read_ints(py::cast<py::tuple>(t[2]), size);
    if (read_ints(py::cast<py::tuple>(t[3]), stride) != n)
      throw py::value_error("sizes and strides differ in length");
    cuda::FilterEntry e;
    if (!cuda::make_filter_entry(pointer<const void>(py::cast<uintptr_t>(t[0])),
                                 read_dtype(py::cast<int>(t[1])), n, size, stride,
                                 py::cast<int>(t[4]), &e)) {
      throw py::value_error(
          "filter_norms: a weight is empty or keeps more than 3 dimensions per filter");
    }
    e.out = pointer<double>(py::cast<uintptr_t>(t[5]));
    entries.push_back(e);
  }
  py::gil_scoped_release release;
  DeviceGuard guard("filter_norms", device);
  check("filter_norms", cuda::filter_norms(entries.data(), static_cast<int>(entries.size()),
                                           pointer<void>(stream)));
}

// The plan of a channel_stats call, which depends on nothing but its arguments; for tests and
// doctors.
py::dict channel_plan(uintptr_t data, int dtype, const py::tuple& sizes, const py::tuple& strides,
                      int channel_dim, int sample_dim) {
  cuda::ChannelPlan p;
  if (!cuda::plan_channel_stats(view_of(data, dtype, sizes, strides, channel_dim, sample_dim),
                                &p)) {
    throw py::value_error("channel_stats: the tensor is empty or too large");
  }
  const char* shapes[] = {"rows", "pieces", "columns"};
  py::dict d;
  d["shape"] = shapes[static_cast<int>(p.shape)];
  d["vec"] = p.vec;
  d["lanes"] = p.lanes;
  d["tile"] = p.tile;
  d["tiles"] = p.tiles;
  d["samples_per_block"] = p.samples_per_block;
  d["pieces"] = p.pieces;
  d["piece"] = p.piece;
  d["slices"] = p.slices;
  d["groups"] = p.groups;
  d["blocks"] = p.blocks;
  d["tickets"] = p.tickets;
  d["scratch"] = p.scratch;
  return d;
}

// (error code, name, text); the code is 0 and the others empty where all is well.
py::tuple outcome(cuda::Status status) {
  if (status == 0) return py::make_tuple(0, "", "");
  return py::make_tuple(status, cuda::error_name(status), cuda::error_text(status));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of idap_kernels; use the functions of idap_kernels instead.";
  m.def("channel_stats", &channel_stats);
  m.def("bn_act_stats", &bn_act_stats);
  m.def("pair_stats", &pair_stats);
  m.def("filter_norms", &filter_norms);
  m.def("channel_plan", &channel_plan);
  m.def("archs", [] { return std::string(IDAP_CUDA_ARCHS); });
  m.def("runtime_version", [] {
    int version = 0;
    check("cudaRuntimeGetVersion", cuda::runtime_version(&version));
    return version;
  });
  m.def("driver_version", [] {
    int version = 0;
    cuda::driver_version(&version);
    return version;
  });
  // (number of devices, outcome)
  m.def("devices", [] {
    int count = 0;
    const cuda::Status status = cuda::device_count(&count);
    return py::make_tuple(status == 0 ? count : 0, outcome(status));
  });
  // (name, major, minor, outcome)
  m.def("device_info", [](int device) {
    cuda::DeviceInfo info;
    const cuda::Status status = cuda::device_info(device, &info);
    return py::make_tuple(std::string(info.name), info.major, info.minor, outcome(status));
  });
  m.def("kernels_load", [](int device) { return outcome(cuda::kernels_load(device)); });
}
