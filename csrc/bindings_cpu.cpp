// idap_kernels._cpu: raw pointers, sizes and strides in; nothing of torch.
// Arguments were checked in Python; what is checked here guards memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef IDAP_X86
#include <cpuid.h>
#endif

#include "common/view.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace idap;

namespace {

// Scratch memory is kept by each thread: a fresh allocation costs page faults at every call.
double* scratch(size_t n) {
  static thread_local std::vector<double> buffer;
  if (buffer.size() < n) {
    buffer.clear();  // growing copies no old content
    buffer.resize(n);
  }
  return buffer.data();
}

const Kernels* choose() {
  const char* wanted = std::getenv("IDAP_ISA");
  const std::string isa = wanted ? wanted : "";
#ifdef IDAP_X86
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx512" && !avx512)
    throw std::runtime_error("IDAP_ISA=avx512, but this processor does not have it");
  if (isa == "avx2" && !avx2)
    throw std::runtime_error("IDAP_ISA=avx2, but this processor does not have it");
  if (isa == "avx512" || (isa.empty() && avx512)) return kernels_avx512();
  if (isa == "avx2" || (isa.empty() && avx2)) return kernels_avx2();
#endif
  if (isa.empty() || isa == "portable") return kernels_portable();
  throw std::runtime_error("IDAP_ISA must be portable" +
#ifdef IDAP_X86
                           std::string(", avx2 or avx512") +
#endif
                           std::string(", got '") + isa + "'");
}

const Kernels& kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}

int read_ints(const py::tuple& t, int64_t* out) {
  if (t.size() > static_cast<size_t>(kMaxDims)) throw py::value_error("too many dimensions");
  int n = 0;
  for (const auto& item : t) out[n++] = py::cast<int64_t>(item);
  return n;
}

View view_of(uintptr_t data, int dtype, const py::tuple& sizes, const py::tuple& strides,
             int channel_dim, int sample_dim) {
  int64_t size[kMaxDims], stride[kMaxDims];
  const int n = read_ints(sizes, size);
  if (read_ints(strides, stride) != n) throw py::value_error("sizes and strides differ in length");
  if (dtype < 0 || dtype > 3) throw py::value_error("unknown dtype code");
  if (data == 0) throw py::value_error("the tensor has no memory");
  View v;
  if (!make_view(reinterpret_cast<const void*>(data), static_cast<DType>(dtype), n, size, stride,
                 channel_dim, sample_dim, &v))
    throw py::value_error("more than 4 position dimensions remain after merging");
  return v;
}

void run_channel_stats(const View& v, int activation, bool accumulate, uintptr_t state, int threads,
                       const NormAct* norm_act) {
  const Kernels& k = kernels();
  py::gil_scoped_release release;
  double* memory = scratch(k.channel_stats_scratch(v));
  k.channel_stats(v, static_cast<Activation>(activation), accumulate, memory,
                  reinterpret_cast<double*>(state), threads, norm_act);
}

void channel_stats(uintptr_t data, int dtype, const py::tuple& sizes, const py::tuple& strides,
                   int channel_dim, int sample_dim, int activation, bool accumulate,
                   uintptr_t state, int threads) {
  const View v = view_of(data, dtype, sizes, strides, channel_dim, sample_dim);
  run_channel_stats(v, activation, accumulate, state, threads, nullptr);
}

// weight and bias may be 0: ones and zeros.
void bn_act_stats(uintptr_t data, int dtype, const py::tuple& sizes, const py::tuple& strides,
                  int channel_dim, int sample_dim, int activation, bool accumulate, uintptr_t state,
                  int threads, uintptr_t y, int act, int norm_dtype, uintptr_t mean, uintptr_t var,
                  uintptr_t weight, uintptr_t bias, double eps) {
  const View v = view_of(data, dtype, sizes, strides, channel_dim, sample_dim);
  if (norm_dtype < 0 || norm_dtype > 3) throw py::value_error("unknown dtype code");
  if (act < 0 || act > 5) throw py::value_error("unknown activation code");
  if (y == 0 || mean == 0 || var == 0) throw py::value_error("the tensor has no memory");
  NormAct n;
  n.y = reinterpret_cast<void*>(y);
  n.act = static_cast<Activation>(act);
  n.dtype = static_cast<DType>(norm_dtype);
  n.mean = reinterpret_cast<const void*>(mean);
  n.var = reinterpret_cast<const void*>(var);
  n.weight = reinterpret_cast<const void*>(weight);
  n.bias = reinterpret_cast<const void*>(bias);
  n.eps = eps;
  run_channel_stats(v, activation, accumulate, state, threads, &n);
}

// The first `row_dims` dimensions are rows, the others are reduced.
void pair_stats(uintptr_t x, uintptr_t y, int dtype, const py::tuple& sizes,
                const py::tuple& x_strides, const py::tuple& y_strides, int row_dims, uintptr_t out,
                int threads) {
  if (x == 0 || y == 0) throw py::value_error("the tensor has no memory");
  PairView v;
  v.x = reinterpret_cast<const void*>(x);
  v.y = reinterpret_cast<const void*>(y);
  v.dtype = static_cast<DType>(dtype);
  int64_t size[kMaxDims], sx[kMaxDims], sy[kMaxDims];
  const int n = read_ints(sizes, size);
  if (read_ints(x_strides, sx) != n || read_ints(y_strides, sy) != n)
    throw py::value_error("sizes and strides differ in length");
  for (int i = 0; i < row_dims; ++i) {
    v.rows *= size[i];
    v.row_size[i] = size[i];
    v.x_row_stride[i] = sx[i];
    v.y_row_stride[i] = sy[i];
  }
  v.row_dims = row_dims;
  // Reduced dimensions in the order of x's memory, merged where both tensors allow it.
  std::vector<int> order;
  for (int i = row_dims; i < n; ++i)
    if (size[i] != 1) {
      size_t at = order.size();
      while (at > 0 && sx[order[at - 1]] < sx[i]) --at;
      order.insert(order.begin() + static_cast<std::ptrdiff_t>(at), i);
    }
  for (int i : order) {
    const int last = v.dims - 1;
    if (last >= 0 && v.x_stride[last] == sx[i] * size[i] && v.y_stride[last] == sy[i] * size[i]) {
      v.size[last] *= size[i];
      v.x_stride[last] = sx[i];
      v.y_stride[last] = sy[i];
    } else {
      v.size[v.dims] = size[i];
      v.x_stride[v.dims] = sx[i];
      v.y_stride[v.dims++] = sy[i];
    }
  }
  const Kernels& k = kernels();
  py::gil_scoped_release release;
  double* memory = scratch(k.pair_stats_scratch(v));
  k.pair_stats(v, memory, reinterpret_cast<double*>(out), threads);
}

// table: (data, dtype, sizes, strides, dim, out) for each weight.
void filter_norms(const py::list& table, int threads) {
  std::vector<View> views;
  std::vector<double*> out;
  for (const auto& item : table) {
    const auto t = py::cast<py::tuple>(item);
    views.push_back(view_of(py::cast<uintptr_t>(t[0]), py::cast<int>(t[1]),
                            py::cast<py::tuple>(t[2]), py::cast<py::tuple>(t[3]),
                            py::cast<int>(t[4]), -1));
    out.push_back(reinterpret_cast<double*>(py::cast<uintptr_t>(t[5])));
  }
  const Kernels& k = kernels();
  py::gil_scoped_release release;
  k.filter_norms(views.data(), out.data(), static_cast<int>(views.size()), threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of idap_kernels; use the functions of idap_kernels instead.";
  m.def("channel_stats", &channel_stats);
  m.def("bn_act_stats", &bn_act_stats);
  m.def("pair_stats", &pair_stats);
  m.def("filter_norms", &filter_norms);
  m.def("read_memory", [](uintptr_t data, size_t bytes, int threads) {
    py::gil_scoped_release release;
    return kernels().read_memory(reinterpret_cast<const void*>(data), bytes, threads);
  });
  m.def("isa", [] { return std::string(kernels().isa); });
  m.def("openmp", [] {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
  });
}
