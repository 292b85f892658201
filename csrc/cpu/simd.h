// Vectors of one instruction set, on GCC/Clang vector extensions. Every file of csrc/cpu that
// includes this is compiled once per instruction set; IDAP_ISA names the namespace, so nothing
// compiled for one set can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../common/accumulator.h"

#ifndef IDAP_ISA
#error "IDAP_ISA must name the instruction set"
#endif

#if defined(__AVX512F__)
#define IDAP_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define IDAP_VECTOR_BYTES 32
#else
#define IDAP_VECTOR_BYTES 16
#endif

#define IDAP_INLINE inline __attribute__((always_inline))

namespace idap {
namespace IDAP_ISA {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

constexpr int kBytes = IDAP_VECTOR_BYTES;
constexpr int kF = kBytes / 4;  // float lanes
constexpr int kD = kBytes / 8;  // double lanes

typedef float vf __attribute__((vector_size(kBytes)));
typedef double vd __attribute__((vector_size(kBytes)));
typedef int32_t vi32 __attribute__((vector_size(kBytes)));
typedef uint32_t vu32 __attribute__((vector_size(kBytes)));
typedef int64_t vi64 __attribute__((vector_size(kBytes)));
typedef int16_t vi16 __attribute__((vector_size(kBytes)));
typedef uint16_t vu16 __attribute__((vector_size(kBytes)));
typedef uint16_t vu16h __attribute__((vector_size(kBytes / 2)));

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  using V = vf;
  using I = vi32;
  static constexpr int n = kF;
};
template <>
struct Lanes<double> {
  using V = vd;
  using I = vi64;
  static constexpr int n = kD;
};

template <class V>
using Element = std::decay_t<decltype(V{}[0])>;

// The type in which a block of elements of type T is accumulated.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

template <class V, class S>
IDAP_INLINE V splat(S x) {
  return x - V{};
}

// ---------------------------------------------------------------- loads, widened to A
IDAP_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
IDAP_INLINE vd load(const double* p) {
  vd v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
IDAP_INLINE vu32 widen_bits(vu16h h) {  // compilers take the long way
#if defined(__AVX512F__)
  return (vu32)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (vu32)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vu32);
#endif
}
IDAP_INLINE vf widen_bf16(vu16h h) { return (vf)(widen_bits(h) << 16); }
IDAP_INLINE vf load(const bf16* p) {
  vu16h h;
  std::memcpy(&h, p, sizeof h);
  return widen_bf16(h);
}
IDAP_INLINE vf widen_f16(vu16h h) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)h);
#else
  // Shift the exponent and mantissa into place and rescale by 2^112, which also normalises
  // subnormals; what then reaches 65536 was infinite or NaN and gets a full exponent.
  vu32 w = __builtin_convertvector(h, vu32);
  vu32 sign = (w & 0x8000u) << 16;
  vf f = (vf)((w & 0x7fffu) << 13) * 0x1p112f;
  vu32 special = (vu32)(f >= 65536.0f) & 0x7f800000u;
  return (vf)((vu32)f | special | sign);
#endif
}
IDAP_INLINE vf load(const f16* p) {
  vu16h h;
  std::memcpy(&h, p, sizeof h);
  return widen_f16(h);
}

// n < lanes elements; the other lanes hold zero.
template <class T>
IDAP_INLINE auto load_partial(const T* p, int n) {
  T buffer[Lanes<typename AccOf<T>::type>::n] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
IDAP_INLINE auto load_strided(const T* p, int64_t stride, int n) {
  T buffer[Lanes<typename AccOf<T>::type>::n] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i * stride];
  return load(buffer);
}

// ------------------------------------------------- stores, rounded to nearest, ties to even
IDAP_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
IDAP_INLINE void store(double* p, vd v) { std::memcpy(p, &v, sizeof v); }
IDAP_INLINE vu16h narrow_bf16(vf v) {
  const vu32 bits = (vu32)v, rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
#if defined(__AVX512F__)
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i kept =
      _mm512_mask_or_epi32((__m512i)rounded, nan, (__m512i)bits, _mm512_set1_epi32(0x400000));
  return (vu16h)_mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#else
  const vu32 nan = (vu32)(v != v);
  const vu32 kept = ((nan & (bits | 0x400000u)) | (~nan & rounded)) >> 16;
#if defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)kept, (__m256i)kept);  // of each half
  return (vu16h)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(kept, vu16h);
#endif
#endif
}
IDAP_INLINE void store(bf16* p, vf v) {
  const vu16h h = narrow_bf16(v);
  std::memcpy(p, &h, sizeof h);
}
IDAP_INLINE vu16h narrow_f16(vf v) {
#if defined(__AVX512F__)
  return (vu16h)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (vu16h)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vu32 sign = ((vu32)v >> 16) & 0x8000u, bits = (vu32)v & 0x7fffffffu;
  // In [0.5, 1) floats are as far apart as subnormal halves: the addition rounds.
  const vu32 subnormal = (vu32)((vf)bits + 0.5f) - 0x3f000000u;
  const vu32 normal = ((bits + 0xfffu + ((bits >> 13) & 1u)) >> 13) - (112u << 10);
  const vi32 magnitude = (vi32)bits;  // not negative, so signed comparisons do
  const vu32 small = (vu32)(magnitude < 0x38800000), infinite = (vu32)(magnitude >= 0x477ff000),
             nan = (vu32)(magnitude > 0x7f800000);
  vu32 h = (small & subnormal) | (~small & normal);
  h = (infinite & 0x7c00u) | (~infinite & h);
  return __builtin_convertvector(sign | h | (nan & 0x0200u), vu16h);
#endif
}
IDAP_INLINE void store(f16* p, vf v) {
  const vu16h h = narrow_f16(v);
  std::memcpy(p, &h, sizeof h);
}

// The first n < lanes elements, stride apart.
template <class T, class V>
IDAP_INLINE void store_strided(T* p, int64_t stride, V v, int n) {
  T buffer[Lanes<typename AccOf<T>::type>::n];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i * stride] = buffer[i];
}

constexpr int kLine = 64;  // bytes of a cache line
#if defined(__SSE2__)
constexpr bool kStreams = true;
#else
constexpr bool kStreams = false;
#endif

// Copies past the caches where this is possible, but for the lines at both ends that are not whole:
// a line that is written both ways costs more than either. fence_streams() has to follow before
// another thread may read.
inline void stream(void* to, const void* from, size_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
#if defined(__SSE2__)
  const size_t past = reinterpret_cast<uintptr_t>(out) % kLine;
  const size_t head = past == 0 ? 0 : kLine - past;
  if (bytes >= head + kLine) {
    if (head) std::memcpy(out, in, head);
    out += head;
    in += head;
    bytes -= head;
    for (; bytes >= kLine; out += kLine, in += kLine, bytes -= kLine) {
#pragma GCC unroll 4
      for (int i = 0; i < kLine; i += kBytes) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(in + i));
#elif defined(__AVX2__)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i)));
#else
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
#endif
      }
    }
  }
#endif
  if (bytes) std::memcpy(out, in, bytes);
}

IDAP_INLINE void fence_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
IDAP_INLINE double to_double(T x) {
  return static_cast<double>(x);
}
template <>
IDAP_INLINE double to_double<f16>(f16 x) {
  return load_partial(&x, 1)[0];
}
template <>
IDAP_INLINE double to_double<bf16>(bf16 x) {
  return load_partial(&x, 1)[0];
}

// ---------------------------------------------------------------- lane-wise arithmetic
// Like x86 MIN/MAX: where either operand is NaN, the second one is returned.
IDAP_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
IDAP_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
IDAP_INLINE vd vmax(vd a, vd b) {
#if defined(__AVX512F__)
  return (vd)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (vd)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}
IDAP_INLINE vd vmin(vd a, vd b) {
#if defined(__AVX512F__)
  return (vd)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (vd)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

IDAP_INLINE vf vabs(vf a) { return (vf)((vu32)a & 0x7fffffffu); }
IDAP_INLINE vd vabs(vd a) { return (vd)((vi64)a & 0x7fffffffffffffffLL); }

// count + 1 in each lane where v > 0 (false for NaN)
IDAP_INLINE vi32 count_positive(vi32 count, vf v) {
#if defined(__AVX512F__)
  const __mmask16 m = _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ);
  return (vi32)_mm512_mask_sub_epi32((__m512i)count, m, (__m512i)count, _mm512_set1_epi32(-1));
#else
  return count - (vi32)(v > 0.0f);
#endif
}
IDAP_INLINE vi64 count_positive(vi64 count, vd v) { return count - (vi64)(v > 0.0); }

IDAP_INLINE vf vsqrt(vf a) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)a);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)a);
#else
  for (int i = 0; i < kF; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}
IDAP_INLINE vd vsqrt(vd a) {
#if defined(__AVX512F__)
  return (vd)_mm512_sqrt_pd((__m512d)a);
#elif defined(__AVX2__)
  return (vd)_mm256_sqrt_pd((__m256d)a);
#else
  for (int i = 0; i < kD; ++i) a[i] = __builtin_sqrt(a[i]);
  return a;
#endif
}

// Integer minima and maxima; compilers know these patterns.
IDAP_INLINE vi16 vmax(vi16 a, vi16 b) { return a > b ? a : b; }
IDAP_INLINE vi16 vmin(vi16 a, vi16 b) { return a < b ? a : b; }
IDAP_INLINE vu16 vmax(vu16 a, vu16 b) { return a > b ? a : b; }

// count + 1 in each lane whose bits are a bfloat16 in (0, inf]
IDAP_INLINE vi16 count_positive_bf16(vi16 count, vu16 bits) {
  const vu16 shifted = bits - 1;
#if defined(__AVX512F__)
  const __mmask32 m = _mm512_cmplt_epu16_mask((__m512i)shifted, _mm512_set1_epi16(0x7f80));
  return (vi16)_mm512_mask_sub_epi16((__m512i)count, m, (__m512i)count, _mm512_set1_epi16(-1));
#else
  return count - (vi16)(shifted < (uint16_t)0x7f80);
#endif
}

// Half of the lanes of a vector of A, widened to double; of a vector of double, all of them.
typedef float vfh __attribute__((vector_size(kBytes / 2)));
typedef int32_t vi32h __attribute__((vector_size(kBytes / 2)));
IDAP_INLINE vd widen_half(vf v, int half) {
  vfh h;
  std::memcpy(&h, reinterpret_cast<const char*>(&v) + half * sizeof h, sizeof h);
  return __builtin_convertvector(h, vd);
}
IDAP_INLINE vd widen_half(vi32 v, int half) {
  vi32h h;
  std::memcpy(&h, reinterpret_cast<const char*>(&v) + half * sizeof h, sizeof h);
  return __builtin_convertvector(h, vd);
}
IDAP_INLINE vd widen_half(vd v, int) { return v; }
IDAP_INLINE vd widen_half(vi64 v, int) { return __builtin_convertvector(v, vd); }

// Sums lanes as a balanced tree: the order is fixed.
template <class A>
IDAP_INLINE double sum_lanes(typename Lanes<A>::V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_reduce_add_ps((__m512)v);
  if constexpr (sizeof(A) == 8) return _mm512_reduce_add_pd((__m512d)v);
#else
  constexpr int n = Lanes<A>::n;
  A x[n];
  std::memcpy(x, &v, sizeof v);
  for (int half = n / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return static_cast<double>(x[0]);
#endif
}
template <class A>
IDAP_INLINE int64_t sum_counts(typename Lanes<A>::I v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_reduce_add_epi32((__m512i)v);
#endif
  int64_t total = 0;
  for (int i = 0; i < Lanes<A>::n; ++i) total += v[i];
  return total;
}

// ---------------------------------------------------------------- activations
// exp(x) for x <= 0, to 2 ulp above -87: 2^k * e^r with |r| <= ln(2)/2 and a Taylor polynomial of
// degree 7.
IDAP_INLINE vf vexp_nonpositive(vf x) {
  const vf lo = splat<vf>(-87.0f);
  const vf xc = vmax(lo, x);  // keeps NaN: it is the second operand
  vf t = xc * 1.44269504088896341f;
  vi32 k = __builtin_convertvector(t - 0.5f, vi32);  // truncation of t - 1/2 rounds, since t <= 0
  vf kf = __builtin_convertvector(k, vf);
  vf r = xc - kf * 0.693359375f;
  r = r + kf * 2.12194440054690583e-4f;  // ln 2 = 0.693359375 - 2.1219...e-4
  vf p = splat<vf>(1.0f / 5040.0f);
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const vf e = p * (vf)((k + 127) << 23);
  return (vf)(~(vi32)(x < -87.0f) &
              (vi32)e);  // below: zero, as exp rounds there but for subnormals
}
IDAP_INLINE vf vsilu(vf x) {
  const vf e = vexp_nonpositive(-vabs(x));  // never overflows
  const vf num = (vf)((vi32)(x < 0.0f) & (vi32)e) + (vf)(~(vi32)(x < 0.0f) & (vi32)splat<vf>(1.0f));
  return x * num / (1.0f + e);
}
// erfc(z), z >= 0, with a relative error of 1.2e-7 plus rounding, in its tail as well: the
// Chebyshev fit of Press et al., Numerical Recipes in C, 2nd edition, section 6.2.
IDAP_INLINE vf verfc_nonnegative(vf z) {
  const vf t = 1.0f / (1.0f + 0.5f * z);
  vf p = splat<vf>(0.17087277f);
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  return t * vexp_nonpositive(p - z * z);
}
IDAP_INLINE vf vgelu(vf x) {
  const vf tail = 0.5f * verfc_nonnegative(vabs(x) * 0.70710678118654752f);
  const vi32 negative = (vi32)(x < 0.0f);
  const vf cdf = (vf)((negative & (vi32)tail) | (~negative & (vi32)(1.0f - tail)));
  return x * cdf;
}
IDAP_INLINE vd vsilu(vd x) {
  for (int i = 0; i < kD; ++i) x[i] = x[i] / (1.0 + __builtin_exp(-x[i]));
  return x;
}
IDAP_INLINE vd vgelu(vd x) {
  for (int i = 0; i < kD; ++i) x[i] = 0.5 * x[i] * __builtin_erfc(-x[i] * 0.70710678118654752440);
  return x;
}

template <Activation kAct, class V>
IDAP_INLINE V activate(V v) {
  if constexpr (kAct == Activation::kRelu) return vmax(V{}, v);
  if constexpr (kAct == Activation::kIdentity) return v;
  if constexpr (kAct == Activation::kGelu) return vgelu(v);
  if constexpr (kAct == Activation::kSilu) return vsilu(v);
  if constexpr (kAct == Activation::kRelu6) return vmin(splat<V>(Element<V>(6)), vmax(V{}, v));
  // 6 * (1 / 6), rounded, is 1: large values stay as they are
  if constexpr (kAct == Activation::kHardswish)
    return v *
           (activate<Activation::kRelu6>(v + Element<V>(3)) * static_cast<Element<V>>(1.0 / 6.0));
}

// ---------------------------------------------------------------- transposition
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define IDAP_HAS_SHUFFLE 1
#endif

template <class V, int N>
struct Zip;  // interleaves the low or the high halves of two vectors
#ifdef IDAP_HAS_SHUFFLE
template <class V>
struct Zip<V, 2> {
  static IDAP_INLINE V lo(V a, V b) { return __builtin_shufflevector(a, b, 0, 2); }
  static IDAP_INLINE V hi(V a, V b) { return __builtin_shufflevector(a, b, 1, 3); }
};
template <class V>
struct Zip<V, 4> {
  static IDAP_INLINE V lo(V a, V b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
  static IDAP_INLINE V hi(V a, V b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
};
template <class V>
struct Zip<V, 8> {
  static IDAP_INLINE V lo(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  }
  static IDAP_INLINE V hi(V a, V b) {
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  }
};
template <class V>
struct Zip<V, 16> {
  static IDAP_INLINE V lo(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
  static IDAP_INLINE V hi(V a, V b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31);
  }
};
#else
template <class V, int N>
struct Zip {
  static IDAP_INLINE V lo(V a, V b) {
    V r = a;
    for (int i = 0; i < N / 2; ++i) {
      r[2 * i] = a[i];
      r[2 * i + 1] = b[i];
    }
    return r;
  }
  static IDAP_INLINE V hi(V a, V b) {
    V r = a;
    for (int i = 0; i < N / 2; ++i) {
      r[2 * i] = a[N / 2 + i];
      r[2 * i + 1] = b[N / 2 + i];
    }
    return r;
  }
};
#endif

template <class V, int N>
IDAP_INLINE void shuffle_round(const V* from, V* to) {
#pragma GCC unroll 8
  for (int i = 0; i < N / 2; ++i) {
    to[2 * i] = Zip<V, N>::lo(from[i], from[i + N / 2]);
    to[2 * i + 1] = Zip<V, N>::hi(from[i], from[i + N / 2]);
  }
}

// from[i][j] -> to[j][i], in log2(n) perfect shuffles; from is overwritten.
template <class A>
IDAP_INLINE void transpose(typename Lanes<A>::V* from, typename Lanes<A>::V* to) {
  using V = typename Lanes<A>::V;
  constexpr int n = Lanes<A>::n;
  shuffle_round<V, n>(from, to);
  if constexpr (n > 2) shuffle_round<V, n>(to, from);
  if constexpr (n > 4) shuffle_round<V, n>(from, to);
  if constexpr (n > 8) shuffle_round<V, n>(to, from);
  if constexpr (n == 4 || n == 16) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) to[i] = from[i];
  }
}

// Calls f with a null pointer of the element type.
template <class F>
inline void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<const float*>(nullptr));
    case DType::kFloat64:
      return f(static_cast<const double*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<const f16*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<const bf16*>(nullptr));
  }
}

}  // namespace IDAP_ISA
}  // namespace idap
