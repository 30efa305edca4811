// Fake quantisation: quantise, then dequantise, with a straight-through gradient (spec omniquant
// §2.4, §2.6).
#include "autograd/compute.h"
#include "autograd/frozen.h"
#include "autograd/ops.h"
#include "tensor/lwc_grid.h"

namespace omq {
namespace {

// What FrozenRounding wants to know of codes: how far from the zero point they are (the codes
// themselves where it learns), and which of them learn.
void note_codes(FrozenRounding& frozen, const Tensor& x, const Tensor& h, const Tensor& z,
                const GroupSpec& s) {
  NoGrad off;
  const int max_code = s.max_code();
  const Tensor t = round(x.detach() / h.detach()) + z.detach(), codes = clamp(t, 0, max_code);
  const double ends = s.end_codes_learn ? 1 : 0;
  frozen.note(s.zero_learns ? codes : codes - z.detach(),
              clamp(t + ends, 0, 1) * clamp(affine(t, -1, max_code + ends), 0, 1));
}

// Sum of every group of a row: x [R,C] → [R,G].
Tensor group_sum(const Tensor& x, const GroupSpec& s) {
  const int64_t rows = x.dim(0), cols = x.dim(1), width = s.group_cols(cols), whole = cols / width;
  Tensor y = Tensor::empty({rows, s.groups(cols)}, x.dtype(), x.device());
  const auto part = [&](int64_t first, int64_t count, int64_t columns) {
    const Tensor piece = reshape(slice(x, 1, first * width, first * width + count * columns),
                                 {rows, count, columns});
    Tensor into = slice(y, 1, first, first + count);
    on(y).copy(into, reshape(sum_to(piece, {rows, count, 1}), {rows, count}));
  };
  if (whole > 0) part(0, whole, width);
  if (cols > whole * width) part(whole, 1, cols - whole * width);
  return y;
}

}  // namespace

Tensor repeat_groups(const Tensor& grid, int64_t cols, GroupSpec s) {
  const int64_t rows = grid.dim(0), groups = grid.dim(1), width = s.group_cols(cols);
  check(groups == s.groups(cols), "repeat_groups: {} columns are {} groups, got {}", cols,
        s.groups(cols), grid.shape());
  const Tensor wide = expand(reshape(grid, {rows, groups, 1}), {rows, groups, width});
  return slice(reshape(wide, {rows, groups * width}), 1, 0, cols);
}

Tensor straight_through(const Tensor& x, const Tensor& value) {
  check(x.shape() == value.shape() && x.dtype() == value.dtype(),
        "straight_through: {} {} for {} {}", dtype_name(value.dtype()), value.shape(),
        dtype_name(x.dtype()), x.shape());
  if (FrozenRounding* const frozen = FrozenRounding::current()) {
    if (frozen->replays()) return frozen->repeat(x);
    frozen->note(value, Tensor::full(x.shape(), 1, x.dtype(), x.device()));
  }
  return record("straight_through", value.detach(), {x},
                [](const Tensor& dy) -> Grads { return {dy}; });
}

Tensor fake_quant_composed(const Tensor& x, const Tensor& scale, const Tensor& zero, GroupSpec s) {
  const Tensor h = repeat_groups(scale, x.dim(1), s);
  const Tensor z = repeat_groups(s.zero_learns ? zero : zero.detach(), x.dim(1), s);
  const Tensor t = round_ste(x / h) + z;
  Tensor codes = clamp(t, 0, s.max_code());
  if (!s.end_codes_learn) {  // halves keep the end codes out of the gradient, not out of the value
    const Tensor inner = clamp(t, 0.5, s.max_code() - 0.5);
    codes = inner + (codes - inner).detach();
  }
  return (codes - z) * h;
}

Tensor fake_quant(const Tensor& x, const Tensor& scale, const Tensor& zero, GroupSpec s) {
  check(x.ndim() == 2 && x.dim(1) > 0, "fake_quant: wants [rows, cols], got {}", x.shape());
  const Shape grid{x.dim(0), s.groups(x.dim(1))};
  check(scale.shape() == grid && zero.shape() == grid,
        "fake_quant: x {} wants grids {}, got {} and {}", x.shape(), grid, scale.shape(),
        zero.shape());
  FrozenRounding* const frozen = FrozenRounding::current();
  if (frozen) {
    const Tensor h = repeat_groups(scale, x.dim(1), s), z = repeat_groups(zero, x.dim(1), s);
    if (frozen->replays())
      return s.zero_learns ? (frozen->repeat(x / h + z) - z) * h : frozen->repeat(x / h) * h;
    note_codes(*frozen, x, h, z, s);
  }
  const Tensor source = contiguous(x), h = contiguous(scale), z = contiguous(zero.detach());
  Tensor y = Tensor::empty(source.shape(), operand_dtype(h.dtype()), source.device());
  on(x).fake_quant(y, source, h, z, s);
  const bool need_scale = needs_grad(scale), need_zero = s.zero_learns && needs_grad(zero);
  const bool need_dx = needs_grad(x) || need_zero;
  return record("fake_quant", y, {source, h, need_zero ? zero : z},
                [x = source.detach(), scale = h.detach(), zero = z, need_dx, need_scale, need_zero,
                 s](const Tensor& any) -> Grads {
                  const Tensor dy = contiguous(any);
                  Tensor dx, ds, dz;
                  if (need_dx) dx = Tensor::empty(x.shape(), scale.dtype(), x.device());
                  if (need_scale) ds = empty_like(scale);
                  on(x).fake_quant_vjp(dx, ds, x, scale, zero, dy, s);
                  if (need_zero)
                    dz =
                        group_sum(dx - to(dy, dx.dtype()), s) * scale;  // dx = dy where not clamped
                  return {dx, ds, dz};
                });
}

ScaleZero lwc_grid_composed(const Tensor& u, const Tensor& l, const Tensor& hi, const Tensor& lo,
                            GroupSpec s) {
  const Tensor top = sigmoid(u) * hi, bottom = sigmoid(l) * lo;
  const double levels = s.max_code();
  const Tensor h = clamp((top - bottom) / levels, kScaleFloor, kScaleCeiling);
  const Tensor z = -bottom.detach() / h.detach();
  return {h,
          s.include_zero ? clamp(round(z), 0, levels) : round(clamp(z, -kZeroLimit, kZeroLimit))};
}

ScaleZero lwc_grid(const Tensor& u, const Tensor& l, const Tensor& hi, const Tensor& lo,
                   GroupSpec s) {
  for (const Tensor* t : {&l, &hi, &lo})
    check(t->shape() == u.shape() && t->dtype() == u.dtype(),
          "lwc_grid: u {} {}, and {} {}: one shape and type wanted", dtype_name(u.dtype()),
          u.shape(), dtype_name(t->dtype()), t->shape());
  const Tensor a = contiguous(u), b = contiguous(l), top = contiguous(hi), bottom = contiguous(lo);
  Tensor scale = empty_like(a), zero = empty_like(a);
  on(u).lwc_grid(scale, zero, a, b, top, bottom, s);
  const bool need_range = needs_grad(top) || needs_grad(bottom);
  scale = record("lwc_grid", scale, {a, b, top, bottom},
                 [u = a.detach(), l = b.detach(), hi = top.detach(), lo = bottom.detach(),
                  need_range, s](const Tensor& dscale) -> Grads {
                   Tensor du = empty_like(u), dl = empty_like(l), dhi, dlo;
                   if (need_range) dhi = empty_like(hi), dlo = empty_like(lo);
                   on(u).lwc_grid_vjp(du, dl, dhi, dlo, u, l, hi, lo, contiguous(dscale), s);
                   return {du, dl, dhi, dlo};
                 });
  return {scale, zero};
}

Tensor fake_quant_lwc_composed(const Tensor& x, const Tensor& u, const Tensor& l, GroupSpec s) {
  const Range r = group_range(x, s);
  const ScaleZero g = lwc_grid(u, l, r.hi, r.lo, s);
  return fake_quant(x, g.scale, g.zero, s);
}

Tensor fake_quant_lwc(const Tensor& x, const Tensor& u, const Tensor& l, GroupSpec s) {
  check(x.ndim() == 2 && x.dim(1) > 0, "fake_quant_lwc: wants [rows, cols], got {}", x.shape());
  const Shape grid{x.dim(0), s.groups(x.dim(1))};
  check(u.shape() == grid && l.shape() == grid,
        "fake_quant_lwc: x {} wants learnables {}, got {} and {}", x.shape(), grid, u.shape(),
        l.shape());
  check(wide_dtype(x.dtype()) == u.dtype() && u.dtype() == l.dtype(),
        "fake_quant_lwc: dtypes differ: {}, {}, {}", dtype_name(x.dtype()), dtype_name(u.dtype()),
        dtype_name(l.dtype()));
  // FrozenRounding looks at every step.
  if (FrozenRounding::current()) return fake_quant_lwc_composed(x, u, l, s);
  const Tensor source = contiguous(x), a = contiguous(u), b = contiguous(l);
  Tensor hi = empty_like(a), lo = empty_like(a), scale = empty_like(a), zero = empty_like(a);
  on(x).group_range(hi, lo, source, s);
  on(x).lwc_grid(scale, zero, a, b, hi, lo, s);
  Tensor y = Tensor::empty(source.shape(), operand_dtype(u.dtype()), source.device());
  on(x).fake_quant(y, source, scale, zero, s);
  return record("fake_quant_lwc", y, {source, a, b},
                [x = source.detach(), u = a.detach(), l = b.detach(), hi, lo, scale, zero,
                 need_x = needs_grad(x), s](const Tensor& dy_any) -> Grads {
                  const Tensor dy = contiguous(dy_any);
                  Tensor none, dx, dscale = empty_like(scale), du = empty_like(u),
                                   dl = empty_like(l), dhi, dlo;
                  on(x).fake_quant_vjp(none, dscale, x, scale, zero, dy, s);
                  if (need_x) dhi = empty_like(hi), dlo = empty_like(lo);
                  on(x).lwc_grid_vjp(du, dl, dhi, dlo, u, l, hi, lo, dscale, s);
                  if (need_x) {
                    dx = Tensor::empty(x.shape(), u.dtype(), x.device());
                    on(x).fake_quant_range_vjp(dx, x, scale, zero, hi, lo, dhi, dlo, dy, s);
                  }
                  return {dx, du, dl};
                });
}

namespace {

struct RowsGrid {
  Tensor h, zero;  // [rows, 1]
};

// The grid of each row of x [rows, N] (tensor/row_quant.h); no gradient goes through zero. share:
// undefined, or [1] in place of s.clip.
RowsGrid rows_grid(const Tensor& rows, RowQuant s, const Tensor& share = {}) {
  const auto clipped = [&](const Tensor& end) {
    return share.defined() ? end * share : end * s.clip;
  };
  const Range r = group_range(rows, {.include_zero = s.include_zero});
  const Tensor levels = Tensor::full({1, 1}, s.max_code(), rows.dtype(), rows.device());
  const double floor = s.include_zero ? 1e-30 : 1e-5, ceiling = s.include_zero ? 1e30 : 1e4;
  const Tensor h = clamp(clipped(r.hi - r.lo) / levels, floor, ceiling);
  const Tensor z = -clipped(r.lo).detach() / h.detach();
  return {h, s.include_zero ? clamp(round(z), 0, s.max_code()) : round(clamp(z, -1e4, 1e4))};
}

}  // namespace

Tensor fake_quant_rows_composed(const Tensor& x, RowQuant s) {
  const Tensor rows = reshape(x, {-1, x.dim(-1)});
  const RowsGrid g = rows_grid(rows, s);
  const GroupSpec spec{.bits = s.bits, .end_codes_learn = s.end_codes_learn};
  return reshape(fake_quant_composed(rows, g.h, g.zero, spec), x.shape());
}

Tensor fake_quant_rows(const Tensor& x, RowQuant s, const Tensor& share) {
  check(share.numel() == 1, "fake_quant_rows: one share wanted, got {}", share.shape());
  const Tensor rows = reshape(to(x, share.dtype()), {-1, x.dim(-1)});
  const RowsGrid g = rows_grid(rows, s, share);
  const GroupSpec spec{.bits = s.bits, .end_codes_learn = s.end_codes_learn};
  return reshape(fake_quant(rows, g.h, g.zero, spec), x.shape());
}

Tensor fake_quant_rows(const Tensor& x, RowQuant s) {
  check(x.ndim() >= 1 && x.dim(-1) > 0, "fake_quant_rows: wants [..., N], got {}", x.shape());
  check(s.bits >= 2 && s.bits <= 8, "fake_quant_rows: {} bits, 2 to 8 wanted", s.bits);
  check(s.clip > 0 && s.clip <= 1, "fake_quant_rows: {} of the range, 0 to 1 wanted", s.clip);
  if (FrozenRounding* const frozen = FrozenRounding::current()) {
    const Tensor rows = reshape(x, {-1, x.dim(-1)});
    const RowsGrid g = rows_grid(rows, s);
    if (frozen->replays()) return reshape(frozen->repeat(rows / g.h) * g.h, x.shape());
    note_codes(*frozen, rows, g.h, g.zero, {.bits = s.bits, .end_codes_learn = s.end_codes_learn});
  }
  const Tensor source = contiguous(x);
  Tensor y = Tensor::empty(source.shape(), product_dtype(source), source.device());
  on(x).fake_quant_rows(y, source, s);
  return record("fake_quant_rows", y, {source},
                [x = needs_grad(x) ? source.detach() : Tensor{}, s](const Tensor& dy) -> Grads {
                  Tensor dx = Tensor::empty(x.shape(), dy.dtype(), x.device());
                  on(x).fake_quant_rows_vjp(dx, x, contiguous(dy), s);
                  return {dx};
                });
}

}  // namespace omq
