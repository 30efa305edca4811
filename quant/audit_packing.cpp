// What is stored is what was simulated (audit.h).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "autograd/ops.h"
#include "nn/packed_weight.h"
#include "quant/audit_parts.h"
#include "quant/calibrate.h"

namespace omq::quant::detail {
namespace {

double differing(const Tensor& a, const Tensor& b) {
  const std::vector<float> va = a.to_vector<float>(), vb = b.to_vector<float>();
  int64_t n = 0;
  for (size_t i = 0; i < va.size(); ++i) n += std::memcmp(&va[i], &vb[i], sizeof(float)) != 0;
  return static_cast<double>(n);
}

// scale · (code − zero), column by column.
Tensor by_hand(const Unpacked& u, const GroupSpec& spec) {
  const int64_t rows = u.codes.dim(0), cols = u.codes.dim(1), width = spec.group_cols(cols);
  Tensor w = Tensor::empty({rows, cols}, DType::F32);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t g = r * spec.groups(cols) + c / width;
      w.data<float>()[r * cols + c] =
          (static_cast<float>(u.codes.data<uint8_t>()[r * cols + c]) - u.zero.data<float>()[g]) *
          u.scale.data<float>()[g];
    }
  return w;
}

// Codes and zero points that are no codes of this width.
double out_of_range(const Unpacked& u, int max_code) {
  int64_t n = 0;
  for (const uint8_t c : u.codes.to_vector<uint8_t>()) n += c > max_code;
  for (const float z : u.zero.to_vector<float>())
    n += !(z >= 0 && z <= static_cast<float>(max_code) && z == std::nearbyint(z));
  return static_cast<double>(n);
}

// Root mean square of (a − b) in steps of the grid.
double steps_between(const Tensor& a, const Tensor& b, const Unpacked& u, const GroupSpec& spec) {
  const std::vector<double> va = doubles(a), vb = doubles(b), h = doubles(u.scale);
  const int64_t cols = a.dim(1), width = spec.group_cols(cols);
  double total = 0;
  for (size_t i = 0; i < va.size(); ++i) {
    const auto r = static_cast<int64_t>(i) / cols, c = static_cast<int64_t>(i) % cols;
    const double d = (va[i] - vb[i]) / h[static_cast<size_t>(r * spec.groups(cols) + c / width)];
    total += d * d;
  }
  return std::sqrt(total / static_cast<double>(va.size()));
}

// A committed block, its matrices side by side.
struct Matrices {
  BlockMethod::Committed block;
  std::vector<nn::NamedLinear> simulated, packed;
  std::vector<Unpacked> codes;  // where weights are codes on a grid
};

// Commits, and compares three ways to read the same bytes: the packed kernel's, what the simulated
// block holds, and unpack_codes with the grid applied by hand.
Matrices commit(const Subject& s, const BlockMethod& method, AuditCheck& c) {
  const CommitData data{s.in.x, s.in.at, {}};
  Matrices m{method.commit(s.fp, &data), {}, {}, {}};
  m.simulated = m.block.simulated->linears(), m.packed = m.block.packed->linears();
  for (size_t i = 0; i < m.packed.size(); ++i) {
    const auto weight = std::get<std::shared_ptr<nn::PackedWeight>>(m.packed[i].linear->weight);
    const Tensor simulated = m.simulated[i].linear->dense();
    worse(c, differing(weight->dequantize(), simulated), m.packed[i].name);
    if (const auto* codes = dynamic_cast<const nn::PackedIntWeight*>(weight.get())) {
      m.codes.push_back(unpack_codes(codes->packed()));
      worse(c, differing(by_hand(m.codes.back(), codes->packed().spec), simulated),
            m.packed[i].name);
    }
  }
  return m;
}

// A rounder that looks at inputs must be nearer than the nearest codes where it counts: in the
// outputs of the first matrix, whose inputs nothing has changed before it is solved.
void audit_solution(const Subject& s, const BlockMethod& method, const Matrices& m,
                    const Found& found) {
  if (s.recipe.train.weights) return;  // what was solved is not the block's own matrix
  attempt({"solved < nearest", "errors of outputs, as a share", 1}, found, [&](AuditCheck& c) {
    const auto block = method.transformed(s.fp);
    const nn::Linear exact = *block->linears().front().linear;
    Tensor x = linear_inputs(*block, s.in.x, s.in.at).front();
    if (exact.input_quant) x = fake_quant_rows(x, *exact.input_quant);
    const Unpacked& u = m.codes.front();
    const auto error = [&](const Tensor& w) {
      return static_cast<double>(sum(square(linear(x, w - exact.dense()))).item<float>());
    };
    const Tensor nearest = fake_quant(exact.dense(), u.scale, u.zero, s.recipe.spec.weight());
    worse(c, error(m.simulated.front().linear->dense()) / error(nearest), m.packed.front().name);
  });
}

void audit_codes(const Subject& s, const BlockMethod& method, const Matrices& m,
                 const Found& found) {
  const GroupSpec spec = s.recipe.spec.weight();
  attempt(
      {"codes in range", fmt::format("codes and zero points outside 0 … {}", spec.max_code()), 0},
      found, [&](AuditCheck& c) {
        for (size_t i = 0; i < m.packed.size(); ++i)
          worse(c, out_of_range(m.codes[i], spec.max_code()), m.packed[i].name);
      });
  if (s.recipe.rounder->wants_hessian()) return audit_solution(s, method, m, found);
  attempt({"committed = trained", "rms of steps between weights", 0.75}, found, [&](AuditCheck& c) {
    const auto trained = method.quantized(s.fp);
    const auto linears = trained->linears();
    for (size_t i = 0; i < m.packed.size(); ++i)
      worse(c,
            steps_between(m.simulated[i].linear->dense(), linears[i].linear->dense(), m.codes[i],
                          spec),
            m.packed[i].name);
  });
}

}  // namespace

void audit_packing(const Subject& s, const Found& found) {
  NoGrad off;
  const BlockMethod method(s.recipe, s.fp, s.stats);
  Random random(s.options.seed);
  randomise(method.learnables(), s.size, random);
  Matrices m;
  attempt({"packed = simulated", "weights whose bits differ", 0}, found,
          [&](AuditCheck& c) { m = commit(s, method, c); });
  if (m.packed.empty()) return;
  if (m.codes.size() == m.packed.size()) audit_codes(s, method, m, found);
  for (const int64_t tokens : {int64_t{1}, s.in.x.dim(1)})
    attempt({fmt::format("packed kernels, {} token{}", tokens, tokens == 1 ? "" : "s"),
             "outputs of the simulated matrices", kPackedError},
            found, [&](AuditCheck& c) {
              const nn::Positions at{slice(s.in.at.index, 0, 0, tokens), s.in.at.tables};
              worse(c,
                    packed_error(m.block, linear_inputs(*m.block.simulated,
                                                        slice(s.in.x, 1, 0, tokens), at)),
                    "");
            });
}

}  // namespace omq::quant::detail
