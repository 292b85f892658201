// What bn_act_stats writes beside the statistics: batch norm and activation of a block in cache.
#include <type_traits>

#include "kernels.h"
#include "simd.h"
#include "writer.h"

namespace idap {
namespace IDAP_ISA {
namespace {

constexpr int64_t kStage = 2048;  // elements that are put together before they are streamed
constexpr int64_t kStreamBytes = 4 << 20;  // smaller maps stay in cache, where the next layer reads

// Whole vectors are read at any channel.
int64_t parameter_pitch(int64_t channels) { return (channels + kF - 1) / kF * kF + kF; }

template <class A>
struct Affine {
  typename Lanes<A>::V mean, scale, bias;
};

template <Activation kAct, class A>
IDAP_INLINE typename Lanes<A>::V apply(const Affine<A>& p, typename Lanes<A>::V x) {
  return activate<kAct>((x - p.mean) * p.scale + p.bias);
}

// Of channels c ..., a lane each.
template <class A>
IDAP_INLINE Affine<A> parameters_at(const Writer& w, int64_t c) {
  const A* p = static_cast<const A*>(w.parameters) + c;
  return {load(p), load(p + w.pitch), load(p + 2 * w.pitch)};
}

// Of channel c, in every lane.
template <class A>
IDAP_INLINE Affine<A> parameters_of(const Writer& w, int64_t c) {
  using V = typename Lanes<A>::V;
  const A* p = static_cast<const A*>(w.parameters) + c;
  return {splat<V>(p[0]), splat<V>(p[w.pitch]), splat<V>(p[2 * w.pitch])};
}

template <class T>
IDAP_INLINE T* target(const Writer& w, const T* x) {
  return reinterpret_cast<T*>(w.y + (reinterpret_cast<const char*>(x) - w.x));
}

// `channels` rows of n, one behind the other, from x to y. A row's last vector runs over into the
// rows behind it, which come later and put it right; nothing at the end of them all is touched.
template <class T, Activation kAct>
void dense_rows(const Writer& w, const T* x, T* y, int64_t n, int64_t channel, int64_t channels) {
  using A = typename AccOf<T>::type;
  constexpr int lanes = Lanes<A>::n;
  const int64_t end = channels * n;
  for (int64_t c = 0; c < channels; ++c) {
    const Affine<A> p = parameters_of<A>(w, channel + c);
    const int64_t row_end = (c + 1) * n;
    int64_t i = c * n;
    for (; i < row_end && i + lanes <= end; i += lanes)
      store(y + i, apply<kAct, A>(p, load(x + i)));
    if (i < row_end) {
      const int rest = static_cast<int>(end - i);
      store_strided(y + i, 1, apply<kAct, A>(p, load_partial(x + i, rest)), rest);
    }
  }
}

template <class T, Activation kAct>
void rows(const Writer& w, const void* at, int64_t channel_stride, int64_t stride, int64_t n,
          int64_t channel, int64_t channels) {
  using A = typename AccOf<T>::type;
  constexpr int lanes = Lanes<A>::n;
  const T* x = static_cast<const T*>(at);
  T* y = target(w, x);
  if (stride != 1) {
    for (int64_t c = 0; c < channels; ++c) {
      const Affine<A> p = parameters_of<A>(w, channel + c);
      for (int64_t i = 0; i < n; i += lanes) {
        const int count = static_cast<int>(n - i < lanes ? n - i : lanes);
        const int64_t o = c * channel_stride + i * stride;
        store_strided(y + o, stride, apply<kAct, A>(p, load_strided(x + o, stride, count)), count);
      }
    }
    return;
  }
  // Rows that follow each other are taken together, as many as fit.
  const int64_t most = channel_stride == n && n <= kStage ? kStage / n : 1;
  for (int64_t c = 0; c < channels; c += most) {
    const int64_t now = channels - c < most ? channels - c : most;
    const int64_t o = c * channel_stride;
    if (w.streams && now * n <= kStage) {
      alignas(kLine) T stage[kStage];
      dense_rows<T, kAct>(w, x + o, stage, n, channel + c, now);
      stream(y + o, stage, static_cast<size_t>(now * n) * sizeof(T));
    } else {
      dense_rows<T, kAct>(w, x + o, y + o, n, channel + c, now);
    }
  }
}

template <class T, Activation kAct>
void columns(const Writer& w, const void* at, const int64_t* offsets, int64_t channel_stride,
             int64_t n, int64_t channel, int64_t channels) {
  using A = typename AccOf<T>::type;
  constexpr int lanes = Lanes<A>::n;
  const T* base = static_cast<const T*>(at);
  if (channel_stride != 1 || channels < lanes) {
    for (int64_t c = 0; c < channels; c += lanes) {
      const int count = static_cast<int>(channels - c < lanes ? channels - c : lanes);
      const Affine<A> p = parameters_at<A>(w, channel + c);
      for (int64_t i = 0; i < n; ++i) {
        const T* x = base + offsets[i] + c * channel_stride;
        store_strided(target(w, x), channel_stride,
                      apply<kAct, A>(p, load_strided(x, channel_stride, count)), count);
      }
    }
    return;
  }
  const int64_t most = kStage / channels;  // a unit has fewer channels than that
  alignas(kLine) T stage[kStage];
  for (int64_t first = 0; first < n; first += most) {
    const int64_t* offset = offsets + first;
    const int64_t now = n - first < most ? n - first : most;
    for (int64_t c = 0; c < channels; c += lanes) {
      const int64_t at_c = c + lanes <= channels ? c : channels - lanes;  // the last full vector
      const Affine<A> p = parameters_at<A>(w, channel + at_c);
      const T* x = base + at_c;
      if (w.streams) {
        for (int64_t i = 0; i < now; ++i)
          store(stage + i * channels + at_c, apply<kAct, A>(p, load(x + offset[i])));
      } else {
        T* y = target(w, x);
        for (int64_t i = 0; i < now; ++i)
          store(y + offset[i], apply<kAct, A>(p, load(x + offset[i])));
      }
    }
    if (!w.streams) continue;
    for (int64_t i = 0, run = 1; i < now; i += run) {
      for (run = 1; i + run < now && offset[i + run] == offset[i] + run * channels;) ++run;
      stream(target(w, base + offset[i]), stage + i * channels,
             static_cast<size_t>(run * channels) * sizeof(T));
    }
  }
}

// The first n <= lanes elements, as A; zeros where there are none.
template <class A, class P>
IDAP_INLINE typename Lanes<A>::V load_as(const P* p, int n) {
  if constexpr (std::is_same_v<typename AccOf<P>::type, A>) {
    return n == Lanes<A>::n ? load(p) : load_partial(p, n);
  } else {
    A wide[Lanes<A>::n] = {};
    for (int i = 0; i < n; ++i) wide[i] = static_cast<A>(to_double(p[i]));
    return load(wide);
  }
}

template <class A, class P>
void read_parameters(const NormAct& norm, int64_t channels, int64_t pitch, A* out) {
  using V = typename Lanes<A>::V;
  constexpr int lanes = Lanes<A>::n;
  const A eps = static_cast<A>(norm.eps);
  for (int64_t c = 0; c < channels; c += lanes) {
    const int n = static_cast<int>(channels - c < lanes ? channels - c : lanes);
    auto get = [&](const void* p, V without) {
      return p ? load_as<A>(static_cast<const P*>(p) + c, n) : without;
    };
    const V one = splat<V>(A(1));
    store(out + c, get(norm.mean, V{}));
    store(out + pitch + c, get(norm.weight, one) / vsqrt(get(norm.var, one) + eps));
    store(out + 2 * pitch + c, get(norm.bias, V{}));
  }
}

template <class T, Activation kAct>
void choose(Writer& w) {
  w.rows = &rows<T, kAct>;
  w.columns = &columns<T, kAct>;
}

}  // namespace

size_t writer_scratch(int64_t channels) {
  return 3 * static_cast<size_t>(parameter_pitch(channels));
}

Writer make_writer(const View& v, const NormAct& norm, double* scratch) {
  Writer w{};
  w.x = static_cast<const char*>(v.data);
  w.y = static_cast<char*>(norm.y);
  w.parameters = scratch;
  w.pitch = parameter_pitch(v.channels);
  dispatch_dtype(v.dtype, [&](auto map) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(map)>>;
    using A = typename AccOf<T>::type;
    dispatch_dtype(norm.dtype, [&](auto parameter) {
      using P = std::remove_cv_t<std::remove_pointer_t<decltype(parameter)>>;
      read_parameters<A, P>(norm, v.channels, w.pitch, reinterpret_cast<A*>(scratch));
    });
    const int64_t bytes = v.samples * v.channels * v.positions() * static_cast<int64_t>(sizeof(T));
    w.streams = kStreams && bytes >= kStreamBytes;
    switch (norm.act) {
      case Activation::kRelu:
        return choose<T, Activation::kRelu>(w);
      case Activation::kIdentity:
        return choose<T, Activation::kIdentity>(w);
      case Activation::kGelu:
        return choose<T, Activation::kGelu>(w);
      case Activation::kSilu:
        return choose<T, Activation::kSilu>(w);
      case Activation::kRelu6:
        return choose<T, Activation::kRelu6>(w);
      case Activation::kHardswish:
        return choose<T, Activation::kHardswish>(w);
    }
  });
  return w;
}

}  // namespace IDAP_ISA
}  // namespace idap
