// Scalar functions over strided tensors, the functors being those of tensor/elementwise.h.
//
// Bytes: every operand that the function needs once (a gradient that does not look at x does not
// load it); broadcast operands come from the cache. The walk goes in packs of eight where shapes
// allow, else element by element.
#include "cuda/common.cuh"
#include "cuda/walk.cuh"

namespace omq::cuda {
namespace {

// Operand 0 is written, 1 … N−1 are read. In packs, offsets of operands that run along the inner
// dim count packs; of those that are constant there, elements.
template <int N> struct Streams {
  Walk<N> walk;
  Operand x[N];
  bool constant[N] = {};
};

template <int W, int N, class F> __global__ void map_kernel(Streams<N> s, F f) {
  for (int64_t i = grid_index(); i < s.walk.count; i += grid_stride()) {
    int64_t at[N];
    offsets(s.walk, i, at);
    decltype(fetch<W>(Operand{}, 0)) raw[N - 1];
    float same[N - 1];
#pragma unroll
    for (int t = 1; t < N; ++t) {
      if (W > 1 && s.constant[t])
        same[t - 1] = load(s.x[t], at[t]);
      else
        raw[t - 1] = fetch<W>(s.x[t], at[t]);
    }
    Piece<W> in[N - 1], out;
#pragma unroll
    for (int t = 1; t < N; ++t) {
      if (W > 1 && s.constant[t]) {
#pragma unroll
        for (int j = 0; j < W; ++j) in[t - 1].v[j] = same[t - 1];
      } else {
        in[t - 1] = expand<W>(raw[t - 1], s.x[t]);
      }
    }
#pragma unroll
    for (int j = 0; j < W; ++j) {
      float v[N - 1];
#pragma unroll
      for (int t = 0; t < N - 1; ++t) v[t] = in[t].v[j];
      out.v[j] = f(v);
    }
    store_piece<W>(s.x[0], at[0], out);
  }
}

template <class F> struct Forward {  // x
  F f;
  __device__ float operator()(const float (&v)[1]) const { return f.fwd(v[0]); }
};
template <class F> struct Backward {  // x, y, dy
  F f;
  __device__ float operator()(const float (&v)[3]) const { return v[2] * f.bwd(v[0], v[1]); }
};
template <class F> struct Forward2 {  // a, b
  F f;
  __device__ float operator()(const float (&v)[2]) const { return f.fwd(v[0], v[1]); }
};
template <class F> struct SlopeA {  // a, b, dy
  F f;
  __device__ float operator()(const float (&v)[3]) const { return v[2] * f.da(v[0], v[1]); }
};
template <class F> struct SlopeB {
  F f;
  __device__ float operator()(const float (&v)[3]) const { return v[2] * f.db(v[0], v[1]); }
};

// ---- launchers ----

template <int N> Streams<N> streams(const char* op, const std::array<const Tensor*, N>& tensors) {
  Streams<N> s;
  std::array<Strides, N> strides;
  for (size_t t = 0; t < N; ++t) {
    check(tensors[t]->shape() == tensors[0]->shape(), "{}: {} beside {}", op, tensors[t]->shape(),
          tensors[0]->shape());
    strides[t] = tensors[t]->strides();
    s.x[t] = operand(op, *tensors[t]);
  }
  s.walk = make_walk<N>(tensors[0]->shape(), strides);
  return s;
}

// Turns the walk into one over packs, if it can be.
template <int N> bool to_packs(Streams<N>& s) {
  std::array<const void*, N> base;
  std::array<bool, N> may_be_constant;
  for (size_t t = 0; t < N; ++t) {
    base[t] = s.x[t].data;
    may_be_constant[t] = t > 0;
  }
  if (!packable<N>(s.walk, base, may_be_constant)) return false;
  Walk<N>& w = s.walk;
  for (int t = 0; t < N; ++t) {
    s.constant[t] = w.inner_step(t) == 0;
    if (s.constant[t]) continue;
    for (int d = 0; d < w.n - 1; ++d) w.step[t][d] /= kPack;
  }
  w.size[w.n - 1] /= kPack;
  w.count /= kPack;
  return true;
}

template <class F, class... T> void map(const char* op, F f, const Tensor& y, const T&... inputs) {
  constexpr int kN = 1 + static_cast<int>(sizeof...(T));
  Streams<kN> s = streams<kN>(op, {&y, &inputs...});
  constexpr int kThreads = 256;
  if (to_packs(s))
    launch(op, y, map_kernel<kPack, kN, F>, blocks_for(s.walk.count, kThreads), kThreads, 0, s, f);
  else
    launch(op, y, map_kernel<1, kN, F>, blocks_for(s.walk.count, kThreads), kThreads, 0, s, f);
}

}  // namespace

void unary(Tensor& y, const Tensor& x, Unary u) {
  visit_unary(u, [&](auto f) { map("unary", Forward<decltype(f)>{f}, y, x); });
}

void unary_vjp(Tensor& dx, const Tensor& x, const Tensor& y, const Tensor& dy, Unary u) {
  visit_unary(u, [&](auto f) { map("unary_vjp", Backward<decltype(f)>{f}, dx, x, y, dy); });
}

void binary(Tensor& y, const Tensor& a, const Tensor& b, Binary kind) {
  visit_binary(kind, [&](auto f) { map("binary", Forward2<decltype(f)>{f}, y, a, b); });
}

void binary_vjp(Tensor& da, Tensor& db, const Tensor& a, const Tensor& b, const Tensor& dy,
                Binary kind) {
  visit_binary(kind, [&](auto f) {
    if (da.defined()) map("binary_vjp", SlopeA<decltype(f)>{f}, da, a, b, dy);
    if (db.defined()) map("binary_vjp", SlopeB<decltype(f)>{f}, db, a, b, dy);
  });
}

}  // namespace omq::cuda
