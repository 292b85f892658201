// Reads memory and does next to nothing with it: the ceiling that the benchmarks compare with.
#include "kernels.h"
#include "simd.h"

namespace idap {
namespace IDAP_ISA {

// Sum of the 32-bit words of [data, data + bytes), bytes a multiple of 4 vectors' size.
uint64_t read_memory(const void* data, size_t bytes, int threads) {
  constexpr int64_t kStep = 4 * kBytes;
  const char* p = static_cast<const char*>(data);
  const int64_t steps = static_cast<int64_t>(bytes) / kStep;
  uint64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    vu32 a{}, b{}, c{}, d{};
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < steps; ++i) {
      vu32 v[4];
      std::memcpy(v, p + i * kStep, sizeof v);
      a += v[0];
      b += v[1];
      c += v[2];
      d += v[3];
    }
    a += b + c + d;
    for (int l = 0; l < kF; ++l) total += a[l];
  }
  return total;
}

}  // namespace IDAP_ISA
}  // namespace idap
