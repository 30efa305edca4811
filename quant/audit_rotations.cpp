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

}  // namespace

WideBlock in_f64(const nn::Block& block, const AuditInputs& in) {
  WideBlock w{block.clone(),
              to(in.x, DType::F64),
              {in.at.index, {to(in.at.tables.cos, DType::F64), to(in.at.tables.sin, DType::F64)}}};
  w.block->visit([](std::string_view, Tensor& t) {
    if (t.defined()) t = to(t, DType::F64);
  });
  return w;
}

void audit_rotations(const nn::Block& fp, int index, const AuditInputs& in, uint64_t seed,
                     const Found& found) {
  NoGrad off;
  const WideBlock plain = in_f64(fp, in);
  const Tensor& x = plain.x;
  const Tensor y = plain.block->forward(x, plain.at);
  const Rotation q = residual_rotation(x.dim(-1), seed);
  for (const Part& part : kParts)
    attempt({part.name, fmt::format("output with quantisers off, F64, {} tokens", x.dim(1)), 1e-9},
            found, [&](AuditCheck& c) {
              const RotationOptions options = only(part, seed);
              const auto b = plain.block->clone();
              rotate_block(*b, index, q, options);
              const Tensor out = options.residual ? q.inverse(b->forward(q(x), plain.at))
                                                  : b->forward(x, plain.at);
              const Worst w = worst_token(out, y, x);
              worse(c, w.error, fmt::format("token {}", w.token));
            });
}

RotatedSubject rotated(const Recipe& recipe, const nn::Block& fp, const AuditInputs& in) {
  NoGrad off;
  RotatedSubject s{fp.clone(), in};
  if (!recipe.rotation) return s;
  const Rotation q = residual_rotation(in.x.dim(-1), recipe.rotation->seed);
  rotate_block(*s.fp, 0, q, *recipe.rotation);
  if (recipe.rotation->residual) s.in.x = to(q(to(in.x, DType::F64)), in.x.dtype());
  return s;
}

}  // namespace omq::quant::detail
