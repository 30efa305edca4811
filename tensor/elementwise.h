// Every scalar function of the library with its derivative, on one page, for host and device.
//
// A row is a struct with fwd(x) and bwd(x, y), the derivative at x where y = fwd(x). Kernels, the
// op of autograd/ops.h, its gradient test and its benchmark follow from the two lists at the end. T
// is float or double. OMQ_HD: callable from CUDA kernels too.
#pragma once

#include <cmath>
#include <cstdint>

#include "tensor/numeric.h"

namespace omq {

namespace fn {

// clang-format off
struct Affine  { double a, b;  template <class T> OMQ_HD T fwd(T x) const { return T(a) * x + T(b); }
                               template <class T> OMQ_HD T bwd(T, T) const { return T(a); } };
struct Exp     { template <class T> OMQ_HD T fwd(T x) const { return exp_fast(x); }
                 template <class T> OMQ_HD T bwd(T, T y) const { return y; } };
struct Log     { template <class T> OMQ_HD T fwd(T x) const { return std::log(x); }
                 template <class T> OMQ_HD T bwd(T x, T) const { return T(1) / x; } };
struct Sqrt    { template <class T> OMQ_HD T fwd(T x) const { return std::sqrt(x); }
                 template <class T> OMQ_HD T bwd(T, T y) const { return T(0.5) / y; } };
struct Square  { template <class T> OMQ_HD T fwd(T x) const { return x * x; }
                 template <class T> OMQ_HD T bwd(T x, T) const { return 2 * x; } };
struct Abs     { template <class T> OMQ_HD T fwd(T x) const { return x < 0 ? -x : x; }
                 template <class T> OMQ_HD T bwd(T x, T) const { return x > 0 ? T(1) : x < 0 ? T(-1) : T(0); } };
struct Sigmoid { template <class T> OMQ_HD T fwd(T x) const { return T(1) / (T(1) + exp_fast(-x)); }
                 template <class T> OMQ_HD T bwd(T, T y) const { return y * (T(1) - y); } };
struct Silu    { template <class T> OMQ_HD T fwd(T x) const { return x / (T(1) + exp_fast(-x)); }
                 template <class T> OMQ_HD T bwd(T x, T) const { const T s = T(1) / (T(1) + exp_fast(-x)); return s * (T(1) + x * (T(1) - s)); } };
// Gradient 1 inside and on the bounds, as PyTorch's clamp.
struct Clamp   { double a, b;  template <class T> OMQ_HD T fwd(T x) const { return x < T(a) ? T(a) : x > T(b) ? T(b) : x; }
                               template <class T> OMQ_HD T bwd(T x, T) const { return x >= T(a) && x <= T(b) ? T(1) : T(0); } };
// Half to even, derivative 0: what the zero point uses.
struct Round   { template <class T> OMQ_HD T fwd(T x) const { return round_even(x); }
                 template <class T> OMQ_HD T bwd(T, T) const { return T(0); } };
// Half to even, straight-through derivative 1: what the codes use.
struct RoundSte{ template <class T> OMQ_HD T fwd(T x) const { return round_even(x); }
                 template <class T> OMQ_HD T bwd(T, T) const { return T(1); } };

struct Add { template <class T> OMQ_HD T fwd(T a, T b) const { return a + b; }
             template <class T> OMQ_HD T da(T, T) const { return T(1); }       template <class T> OMQ_HD T db(T, T) const { return T(1); } };
struct Sub { template <class T> OMQ_HD T fwd(T a, T b) const { return a - b; }
             template <class T> OMQ_HD T da(T, T) const { return T(1); }       template <class T> OMQ_HD T db(T, T) const { return T(-1); } };
struct Mul { template <class T> OMQ_HD T fwd(T a, T b) const { return a * b; }
             template <class T> OMQ_HD T da(T, T b) const { return b; }        template <class T> OMQ_HD T db(T a, T) const { return a; } };
struct Div { template <class T> OMQ_HD T fwd(T a, T b) const { return a / b; }
             template <class T> OMQ_HD T da(T, T b) const { return T(1) / b; } template <class T> OMQ_HD T db(T a, T b) const { return -a / (b * b); } };
// The larger one gets the gradient; both get half of it when equal.
struct Max { template <class T> OMQ_HD T fwd(T a, T b) const { return a > b ? a : b; }
             template <class T> OMQ_HD T da(T a, T b) const { return a > b ? T(1) : a < b ? T(0) : T(0.5); }
             template <class T> OMQ_HD T db(T a, T b) const { return b > a ? T(1) : b < a ? T(0) : T(0.5); } };
// clang-format on

}  // namespace fn

// name of the op, functor. `a`, `b` are the parameters of Affine (a·x + b) and Clamp ([a, b]).
#define OMQ_UNARY_LIST(X) \
  X(affine, Affine)       \
  X(exp, Exp)             \
  X(log, Log)             \
  X(sqrt, Sqrt)           \
  X(square, Square)       \
  X(abs, Abs)             \
  X(sigmoid, Sigmoid)     \
  X(silu, Silu)           \
  X(clamp, Clamp)         \
  X(round, Round)         \
  X(round_ste, RoundSte)
#define OMQ_BINARY_LIST(X) \
  X(add, Add)              \
  X(sub, Sub)              \
  X(mul, Mul)              \
  X(div, Div)              \
  X(maximum, Max)

enum class UnaryKind : uint8_t {
#define OMQ_ROW(name, functor) functor,
  OMQ_UNARY_LIST(OMQ_ROW)
#undef OMQ_ROW
};
struct Unary {
  UnaryKind kind;
  double a = 0, b = 0;
};
enum class Binary : uint8_t {
#define OMQ_ROW(name, functor) functor,
  OMQ_BINARY_LIST(OMQ_ROW)
#undef OMQ_ROW
};

// Calls f(functor) with the functor that u names.
template <class F> void visit_unary(Unary u, F&& f) {
  switch (u.kind) {
    case UnaryKind::Affine:
      return f(fn::Affine{u.a, u.b});
    case UnaryKind::Clamp:
      return f(fn::Clamp{u.a, u.b});
    case UnaryKind::Exp:
      return f(fn::Exp{});
    case UnaryKind::Log:
      return f(fn::Log{});
    case UnaryKind::Sqrt:
      return f(fn::Sqrt{});
    case UnaryKind::Square:
      return f(fn::Square{});
    case UnaryKind::Abs:
      return f(fn::Abs{});
    case UnaryKind::Sigmoid:
      return f(fn::Sigmoid{});
    case UnaryKind::Silu:
      return f(fn::Silu{});
    case UnaryKind::Round:
      return f(fn::Round{});
    case UnaryKind::RoundSte:
      return f(fn::RoundSte{});
  }
}
template <class F> void visit_binary(Binary b, F&& f) {
  switch (b) {
#define OMQ_ROW(name, functor) \
  case Binary::functor:        \
    return f(fn::functor{});
    OMQ_BINARY_LIST(OMQ_ROW)
#undef OMQ_ROW
  }
}

}  // namespace omq
