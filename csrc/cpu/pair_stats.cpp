// pair_stats on the CPU: x.x, y.y, x.y and |y - x|^2 of each row, both tensors read once.
// The difference is squared as it stands: xx - 2 xy + yy would cancel where y is close to x.
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace idap {
namespace IDAP_ISA {
namespace {

constexpr int kLaneBlock = 128;       // products a lane takes before they are carried into double
constexpr int64_t kChunk = 32768;     // longest piece of a row that one unit takes
constexpr int64_t kUnitWork = 32768;  // elements that make a unit worth a thread
constexpr int64_t kSerialWork = 1 << 17;  // elements below which waking a second thread costs more

struct Plan {
  int64_t rows_per_unit, row_units, chunks;
  int64_t units() const { return row_units * chunks; }
};

Plan make_plan(const PairView& v) {
  const int64_t n = v.positions();
  Plan p{1, v.rows, 1};
  if (v.dims == 1 && n > kChunk) p.chunks = (n + kChunk - 1) / kChunk;
  if (n < kUnitWork) {
    p.rows_per_unit = kUnitWork / (n > 0 ? n : 1);
    p.row_units = (v.rows + p.rows_per_unit - 1) / p.rows_per_unit;
  }
  return p;
}

int64_t offset_of(int64_t i, int dims, const int64_t* size, const int64_t* stride) {
  int64_t offset = 0;
  for (int d = dims - 1; d >= 0; --d) {
    offset += i % size[d] * stride[d];
    i /= size[d];
  }
  return offset;
}

template <class T, bool kContiguous>
void run_piece(const T* x, const T* y, int64_t sx, int64_t sy, int64_t n, double* sums) {
  using A = typename AccOf<T>::type;
  using V = typename Lanes<A>::V;
  constexpr int lanes = Lanes<A>::n;
  auto at = [](const T* p, int64_t stride, int64_t i, int count) {
    if constexpr (kContiguous) return count == lanes ? load(p + i) : load_partial(p + i, count);
    return load_strided(p + i * stride, stride, count);
  };
  for (int64_t begin = 0; begin < n; begin += kLaneBlock * lanes) {
    const int64_t end = begin + kLaneBlock * lanes < n ? begin + kLaneBlock * lanes : n;
    V xx{}, yy{}, xy{}, dd{};
    auto step = [&](V a, V b) {
      const V d = b - a;
      xx += a * a;
      yy += b * b;
      xy += a * b;
      dd += d * d;
    };
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) step(at(x, sx, i, lanes), at(y, sy, i, lanes));
    if (i < end) {
      const int rest = static_cast<int>(end - i);
      step(at(x, sx, i, rest), at(y, sy, i, rest));  // missing lanes are zero in both
    }
    sums[kXX] += sum_lanes<A>(xx);
    sums[kYY] += sum_lanes<A>(yy);
    sums[kXY] += sum_lanes<A>(xy);
    sums[kDD] += sum_lanes<A>(dd);
  }
}

template <class T>
void run_row(const PairView& v, int64_t row, int64_t begin, int64_t end, double* sums) {
  const T* x = static_cast<const T*>(v.x) + offset_of(row, v.row_dims, v.row_size, v.x_row_stride);
  const T* y = static_cast<const T*>(v.y) + offset_of(row, v.row_dims, v.row_size, v.y_row_stride);
  const int64_t inner = v.dims ? v.size[v.dims - 1] : 1;
  const int64_t sx = v.dims ? v.x_stride[v.dims - 1] : 1, sy = v.dims ? v.y_stride[v.dims - 1] : 1;
  auto piece = [&](const T* a, const T* b, int64_t n) {
    if (sx == 1 && sy == 1)
      run_piece<T, true>(a, b, 1, 1, n, sums);
    else
      run_piece<T, false>(a, b, sx, sy, n, sums);
  };
  if (v.dims <= 1) return piece(x + begin * sx, y + begin * sy, end - begin);
  for (int64_t i = begin; i < end; i += inner)
    piece(x + offset_of(i, v.dims, v.size, v.x_stride),
          y + offset_of(i, v.dims, v.size, v.y_stride), inner);
}

template <class T>
void run(const PairView& v, double* scratch, double* out, int threads) {
  const Plan p = make_plan(v);
  const int64_t n = v.positions(), units = p.units();
  if (units == 1 || v.rows * n < kSerialWork) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < units; ++u) {
      const int64_t chunk = u % p.chunks, first = u / p.chunks * p.rows_per_unit;
      const int64_t last = first + p.rows_per_unit < v.rows ? first + p.rows_per_unit : v.rows;
      for (int64_t r = first; r < last; ++r) {
        double* sums = scratch + (r * p.chunks + chunk) * kPairRows;
        for (int k = 0; k < kPairRows; ++k) sums[k] = 0.0;
        run_row<T>(v, r, n * chunk / p.chunks, n * (chunk + 1) / p.chunks, sums);
      }
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < v.rows; ++r)
      for (int k = 0; k < kPairRows; ++k) {
        double total = 0.0;
        for (int64_t c = 0; c < p.chunks; ++c) total += scratch[(r * p.chunks + c) * kPairRows + k];
        out[k * v.rows + r] = total;
      }
  }
}

}  // namespace

size_t pair_stats_scratch(const PairView& v) {
  return static_cast<size_t>(v.rows * make_plan(v).chunks * kPairRows);
}

void pair_stats(const PairView& v, double* scratch, double* out, int threads) {
  dispatch_dtype(v.dtype, [&](auto tag) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(tag)>>;
    run<T>(v, scratch, out, threads);
  });
}

}  // namespace IDAP_ISA
}  // namespace idap
