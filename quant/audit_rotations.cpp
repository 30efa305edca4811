// Rotations leave what a block computes as it is (audit.h): part by part and all together,
// whichever of them the recipe makes. Where the residual stream is rotated, the block is compared
// in the old basis: block'(x·Q)·Qᵀ.
#include "autograd/ops.h"
#include "quant/audit_parts.h"

namespace omq::quant::detail {
namespace {

struct Part {
  const char* name;
  bool RotationOptions::*flag;  // null: all
};
constexpr Part kParts[] = {{"rotation of residual", &RotationOptions::residual},
                           {"rotation of norms", &RotationOptions::norms},
                           {"rotation of values", &RotationOptions::values},
                           {"rotation of heads", &RotationOptions::heads},
                           {"rotation of down", &RotationOptions::down},
                           {"rotation of query_key", &RotationOptions::query_key},
                           {"all rotations", nullptr}};

RotationOptions only(const Part& part, uint64_t seed) {
  const bool all = part.flag == nullptr;
  RotationOptions o{.seed = seed,
                    .residual = all,
                    .values = all,
                    .norms = all,
                    .heads = all,
                    .down = all,
                    .query_key = all};
  if (!all) o.*part.flag = true;
  return o;
}

template <class F> Tensor in_f64(const Tensor& x, const F& f) {
  return to(f(to(x, DType::F64)), x.dtype());
}

}  // namespace

void audit_rotations(const nn::Block& fp, int index, const AuditInputs& in, uint64_t seed,
                     const Found& found) {
  NoGrad off;
  const Tensor y = fp.forward(in.x, in.at);
  const Rotation q = residual_rotation(in.x.dim(-1), seed);
  for (const Part& part : kParts)
    attempt({part.name, fmt::format("output with quantisers off, {} tokens", in.x.dim(1)), 1e-5},
            found, [&](AuditCheck& c) {
              const RotationOptions options = only(part, seed);
              const auto b = fp.clone();
              rotate_block(*b, index, q, options);
              Tensor out;
              if (options.residual)
                out = in_f64(b->forward(in_f64(in.x, q), in.at),
                             [&](const Tensor& t) { return q.inverse(t); });
              else
                out = b->forward(in.x, in.at);
              const Worst w = worst_token(out, y, in.x);
              worse(c, w.error, fmt::format("token {}", w.token));
            });
}

RotatedSubject rotated(const Recipe& recipe, const nn::Block& fp, const AuditInputs& in) {
  NoGrad off;
  RotatedSubject s{fp.clone(), in};
  if (!recipe.rotation) return s;
  const Rotation q = residual_rotation(in.x.dim(-1), recipe.rotation->seed);
  rotate_block(*s.fp, 0, q, *recipe.rotation);
  if (recipe.rotation->residual) s.in.x = in_f64(in.x, q);
  return s;
}

}  // namespace omq::quant::detail
