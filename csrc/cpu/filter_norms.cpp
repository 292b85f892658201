// filter_norms on the CPU: the L2 norm of every filter of many weights, in one parallel region.
#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace idap {
namespace IDAP_ISA {
namespace {

constexpr int64_t kUnit = 1 << 16;  // elements of one unit of work, about

int64_t offset_of(const View& v, int64_t i) {
  int64_t offset = 0;
  for (int d = v.dims - 1; d >= 0; --d) {
    offset += i % v.size[d] * v.stride[d];
    i /= v.size[d];
  }
  return offset;
}

// The square of each lane, in double, added up: weights may be too small or large to square in
// float.
template <class A>
IDAP_INLINE vd add_squares(vd sum, typename Lanes<A>::V v) {
#pragma GCC unroll 2
  for (int h = 0; h < Lanes<A>::n / kD; ++h) {
    const vd x = widen_half(v, h);
    sum += x * x;
  }
  return sum;
}

template <class T>
double run_sum(const T* p, int64_t stride, int64_t n) {
  using A = typename AccOf<T>::type;
  constexpr int lanes = Lanes<A>::n;
  vd sum{};
  int64_t i = 0;
  if (stride == 1)
    for (; i + lanes <= n; i += lanes) sum = add_squares<A>(sum, load(p + i));
  for (; i < n; i += lanes) {
    const int count = n - i < lanes ? static_cast<int>(n - i) : lanes;
    sum = add_squares<A>(sum, load_strided(p + i * stride, stride, count));
  }
  return sum_lanes<double>(sum);
}

// A filter is one run, or several, of memory.
template <class T>
void filters_by_row(const View& v, double* out, int64_t c0, int64_t c1) {
  const int64_t inner = v.dims ? v.size[v.dims - 1] : 1;
  const int64_t stride = v.dims ? v.stride[v.dims - 1] : 1;
  const int64_t n = v.positions();
  for (int64_t c = c0; c < c1; ++c) {
    const T* p = static_cast<const T*>(v.data) + c * v.channel_stride;
    double total = 0.0;
    for (int64_t i = 0; i < n; i += inner) total += run_sum(p + offset_of(v, i), stride, inner);
    out[c] = std::sqrt(total);
  }
}

// Filters lie side by side: a lane each.
template <class T>
void filters_by_lane(const View& v, double* out, int64_t c0, int64_t c1) {
  using A = typename AccOf<T>::type;
  using V = typename Lanes<A>::V;
  constexpr int lanes = Lanes<A>::n;
  const int64_t n = v.positions();
  for (int64_t c = c0; c < c1; c += lanes) {
    const int count = c1 - c < lanes ? static_cast<int>(c1 - c) : lanes;
    const T* p = static_cast<const T*>(v.data) + c;
    constexpr int halves = lanes / kD;
    vd total[halves] = {};
    for (int64_t i = 0; i < n; ++i) {
      const T* q = p + offset_of(v, i);
      const V x = count == lanes ? load(q) : load_partial(q, count);
#pragma GCC unroll 2
      for (int h = 0; h < halves; ++h) total[h] += widen_half(x, h) * widen_half(x, h);
    }
    for (int l = 0; l < count; ++l) out[c + l] = std::sqrt(total[l / kD][l % kD]);
  }
}

// Filters of one unit: about kUnit elements, a whole number of vectors.
int64_t filters_per_unit(const View& v) {
  const int64_t n = v.positions();
  const int64_t filters = kUnit / (n > 0 ? n : 1);
  return filters < 64 ? 64 : filters / 64 * 64;
}

bool by_lane(const View& v) {
  const int64_t inner = v.dims ? v.stride[v.dims - 1] : 0;
  return v.channel_stride == 1 && inner != 1 && v.channels > 1;
}

}  // namespace

void filter_norms(const View* views, double* const* out, int n, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int i = 0; i < n; ++i) {
    const View& v = views[i];
    const int64_t step = filters_per_unit(v), units = (v.channels + step - 1) / step;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t u = 0; u < units; ++u) {
      const int64_t c0 = u * step, c1 = c0 + step < v.channels ? c0 + step : v.channels;
      dispatch_dtype(v.dtype, [&](auto tag) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(tag)>>;
        if (by_lane(v))
          filters_by_lane<T>(v, out[i], c0, c1);
        else
          filters_by_row<T>(v, out[i], c0, c1);
      });
    }
  }
}

}  // namespace IDAP_ISA
}  // namespace idap
