// Runs the CUDA kernels on the host, for tests only. Every thread of a block is a fiber with a
// stack of its own; a fiber runs until it meets __syncthreads or a shuffle, then the others have
// their turn, in an order that the test chooses. Blocks run one after the other, also in a chosen
// order.
//
// What a real GPU would punish is reported: a misaligned or out-of-range load, a barrier that some
// threads never reach, lanes of a warp that meet different shuffles. Shared memory is filled with
// NaN before each block. What it cannot show: races between blocks in flight, and anything about
// time.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define IDAP_SHARED(type, name, count) type* name = ::emulation::shared<type>(count)
#define IDAP_LAUNCH(kernel, blocks, stream, ...) \
  ::emulation::launch(static_cast<unsigned>(blocks), [&] { kernel(__VA_ARGS__); }, stream)

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;

namespace emulation {

constexpr int kThreads = 256, kWarp = 32, kStack = 1 << 16, kShared = 1 << 16;

struct Index {
  unsigned x = 0;
};

struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool started = false, done = false;
  size_t shared_used = 0;
  int parity = 0;
};

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t value[2][kWarp];
  int kind[2][kWarp];  // size and offset of each lane's shuffle: all lanes must agree
};

struct Range {
  const char *begin, *end;
};

struct State {
  Index thread, block;
  Fiber fibers[kThreads];
  std::vector<char> stacks = std::vector<char>(static_cast<size_t>(kThreads) * kStack);
  alignas(16) char shared[kShared];
  Barrier barrier;
  Warp warps[kThreads / kWarp];
  ucontext_t start;
  jmp_buf scheduler;
  int progress = 0;
  std::function<void()> body;
  unsigned order = 0;  // seed of the order of threads and blocks; 0: ascending
  std::string error;
  std::vector<Range> readable;  // empty: anything
  const char* watched = nullptr;
  uint16_t* counts = nullptr;  // loads of each byte from `watched` on
  size_t watched_bytes = 0;
  const char* written = nullptr;  // the only memory that whole items may be stored to
  uint16_t* stores = nullptr;     // stores to each byte of it
  size_t written_bytes = 0;
  int64_t launches = 0;
};

inline State& state() {
  static State* s = new State;
  return *s;
}

inline void fail(const std::string& what) {
  State& s = state();
  if (s.error.empty()) {
    s.error = what + " (block " + std::to_string(s.block.x) + ", thread " +
              std::to_string(s.thread.x) + ")";
  }
}

inline void yield() {
  State& s = state();
  if (_setjmp(s.fibers[s.thread.x].at) == 0) _longjmp(s.scheduler, 1);
}

inline void wait(Barrier& b, int members) {
  State& s = state();
  const int generation = b.generation;
  if (++b.arrived == members) {
    b.arrived = 0;
    ++b.generation;
    ++s.progress;
    return;
  }
  while (b.generation == generation) yield();
}

template <typename T>
T* shared(size_t count) {
  State& s = state();
  size_t& used = s.fibers[s.thread.x].shared_used;
  T* p = reinterpret_cast<T*>(s.shared + used);
  used += (count * sizeof(T) + 15) / 16 * 16;
  if (used > kShared) fail("shared memory is used up");
  return p;
}

inline void fiber_main() {
  State& s = state();
  s.body();
  s.fibers[s.thread.x].done = true;
  ++s.progress;
  _longjmp(s.scheduler, 1);
}

inline void run_block(const std::vector<int>& order) {
  State& s = state();
  memset(s.shared, 0xff, kShared);
  s.barrier = Barrier();
  for (Warp& w : s.warps) w.barrier = Barrier();
  for (int i = 0; i < kThreads; ++i) {
    Fiber& f = s.fibers[i];
    f.started = f.done = false;
    f.shared_used = 0;
    f.parity = 0;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = s.stacks.data() + static_cast<size_t>(i) * kStack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
  static int k, left, before;  // not on the stack: _longjmp may not restore it
  left = kThreads;
  while (left > 0) {
    before = s.progress;
    left = 0;
    for (k = 0; k < kThreads; ++k) {
      Fiber& f = s.fibers[order[static_cast<size_t>(k)]];
      if (f.done) continue;
      ++left;
      s.thread.x = static_cast<unsigned>(order[static_cast<size_t>(k)]);
      if (_setjmp(s.scheduler) == 0) {
        if (f.started) _longjmp(f.at, 1);
        f.started = true;
        setcontext(&f.context);
      }
    }
    if (left > 0 && s.progress == before) {
      fail("threads wait at a barrier that others never reach");
      return;
    }
  }
}

inline void launch(unsigned blocks, std::function<void()> body, cudaStream_t) {
  State& s = state();
  ++s.launches;
  s.body = std::move(body);
  std::vector<int> threads(kThreads);
  std::vector<unsigned> grid(blocks);
  std::iota(threads.begin(), threads.end(), 0);
  std::iota(grid.begin(), grid.end(), 0u);
  if (s.order != 0) {
    std::mt19937 random(s.order);
    std::shuffle(threads.begin(), threads.end(), random);
    std::shuffle(grid.begin(), grid.end(), random);
  }
  for (unsigned b : grid) {
    s.block.x = b;
    run_block(threads);
    if (!s.error.empty()) return;
  }
}

inline void check_load(const void* address, size_t bytes) {
  State& s = state();
  const char* p = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("misaligned load of " + std::to_string(bytes) + " bytes");
  const bool inside =
      s.readable.empty() || std::any_of(s.readable.begin(), s.readable.end(), [&](const Range& r) {
        return p >= r.begin && p + bytes <= r.end;
      });
  if (!inside) fail("load out of range");
  if (s.counts && p >= s.watched && p + bytes <= s.watched + s.watched_bytes) {
    for (size_t i = 0; i < bytes; ++i) ++s.counts[static_cast<size_t>(p - s.watched) + i];
  }
}

inline bool check_store(const void* address, size_t bytes) {
  State& s = state();
  const char* p = static_cast<const char*>(address);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("misaligned store of " + std::to_string(bytes) + " bytes");
  if (p < s.written || p + bytes > s.written + s.written_bytes) fail("store out of range");
  if (!s.error.empty()) return false;
  for (size_t i = 0; i < bytes; ++i) ++s.stores[static_cast<size_t>(p - s.written) + i];
  return true;
}

template <typename T>
T shuffle_xor(T value, int offset) {
  static_assert(sizeof(T) <= 8, "one register or two");
  State& s = state();
  const int lane = static_cast<int>(s.thread.x) % kWarp;
  Warp& w = s.warps[s.thread.x / kWarp];
  int& parity = s.fibers[s.thread.x].parity;
  const int now = parity;
  parity ^= 1;
  const int kind = static_cast<int>(sizeof(T)) * 64 + offset;
  w.value[now][lane] = 0;
  memcpy(&w.value[now][lane], &value, sizeof(T));
  w.kind[now][lane] = kind;
  wait(w.barrier, kWarp);
  const int other = lane ^ offset;
  if (w.kind[now][other] != kind) fail("lanes of a warp meet different shuffles");
  T result;
  memcpy(&result, &w.value[now][other], sizeof(T));
  return result;
}

}  // namespace emulation

#define threadIdx (::emulation::state().thread)
#define blockIdx (::emulation::state().block)

inline void __syncthreads() {
  ::emulation::wait(::emulation::state().barrier, ::emulation::kThreads);
}
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  return ::emulation::shuffle_xor(value, offset);
}

template <typename T>
T __ldg(const T* p) {
  ::emulation::check_load(p, sizeof(T));
  T value;
  if (::emulation::state().error.empty()) {
    memcpy(&value, p, sizeof(T));
  } else {
    memset(&value, 0xff, sizeof(T));  // the address may not be ours to read
  }
  return value;
}

template <typename T>
T __ldcg(const T* p) {
  return __ldg(p);
}

template <typename T>
T __ldcs(const T* p) {
  return __ldg(p);
}

template <typename T>
void __stwb(T* p, T value) {
  if (::emulation::check_store(p, sizeof(T))) memcpy(p, &value, sizeof(T));
}

inline unsigned atomicInc(unsigned* p, unsigned limit) {
  const unsigned old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline float __uint_as_float(unsigned bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}
inline double __hiloint2double(int high, int low) {
  const uint64_t bits =
      static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low);
  double d;
  memcpy(&d, &bits, sizeof d);
  return d;
}

struct EmulatedHalf {
  unsigned short bits;
};
inline EmulatedHalf __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(EmulatedHalf h) {
  const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  const float sign = h.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? __uint_as_float(0x7fc00000u) : sign * INFINITY;
  if (exponent == 0) return sign * ldexpf(static_cast<float>(mantissa), -24);
  return sign * ldexpf(static_cast<float>(mantissa + 1024), exponent - 25);
}

// nearbyint rounds to nearest, ties to even.
inline unsigned short emulated_half(float f) {
  const unsigned sign = __float_as_uint(f) >> 16 & 0x8000u;
  const float a = fabsf(f);
  if (a != a) return 0x7fff;
  if (a >= 65520.0f) return static_cast<unsigned short>(sign | 0x7c00u);  // rounds to infinity
  int exponent = -14;
  if (a >= 0x1p-14f) exponent = ilogbf(a);
  const unsigned steps = static_cast<unsigned>(nearbyintf(ldexpf(a, 10 - exponent)));
  return static_cast<unsigned short>(sign | (static_cast<unsigned>(exponent + 14) * 1024u + steps));
}
struct EmulatedPair {
  unsigned short low, high;
};
inline EmulatedPair __floats2half2_rn(float low, float high) {
  return {emulated_half(low), emulated_half(high)};
}

inline int cudaGetLastError() { return ::emulation::state().error.empty() ? 0 : 1; }
