// What the parts of the audit share (audit.h). Nobody else but their test includes this.
#pragma once

#include <cstdint>
#include <random>

#include "quant/audit.h"
#include "quant/report.h"

namespace omq::quant::detail {

using Found = std::function<void(const AuditCheck&)>;

// The same numbers everywhere: the standard's distributions differ between libraries.
class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  double uniform(double lo, double hi) {
    return lo + (hi - lo) * static_cast<double>(bits_() >> 11) * 0x1p-53;
  }
  double normal();
  double sign() { return bits_() & 1 ? 1 : -1; }
  size_t below(size_t n) { return static_cast<size_t>(bits_() % n); }

 private:
  std::mt19937_64 bits_;
};

std::vector<double> doubles(const Tensor& t);
// In place, in whatever type p has.
void fill(const Tensor& p, const std::vector<double>& values);

enum class Kind { Scale, Shift, Step, Share, Weight, Factor, Other };
Kind kind_of(const std::string& learnable);
// p stands at its start; size: of the activations.
void randomise(const Tensor& p, Kind kind, double size, Random& random);
void randomise(const std::vector<Learnable>& learnables, double size, Random& random);

// What every check of one recipe and block starts from.
struct Subject {
  const Recipe& recipe;
  nn::Block& fp;
  AuditInputs in;
  AuditOptions options;
  BlockStats stats;
  double size = 1;  // of the activations
};

// Runs one check and tells it; what it throws is its fault.
struct Aim {
  std::string name, compared;
  double bound;
};
void attempt(const Aim& aim, const Found& found, const std::function<void(AuditCheck&)>& body);
// Takes `error` into the check when it is the worst so far, or no number.
void worse(AuditCheck& check, double error, const std::string& where);

// Tells the checks of one random point, each of a name of its own. A point may lie so near a kink
// that every step jumps over it, and F32 stands on its other side; two points do not, but a wrong
// gradient is wrong at both. What is out of bounds at the first is therefore tried at a second, and
// says so; what could not be tried has failed.
using ChecksAt = std::function<std::vector<AuditCheck>(uint64_t seed)>;
void at_two_points(const ChecksAt& checks_at, uint64_t seed, const Found& found);

// The largest ‖a − y‖ / ‖y − x‖ of a token: what changed, against what the block adds, so that the
// residual stream hides nothing.
struct Worst {
  double error = 0;
  int64_t token = 0;
};
Worst worst_token(const Tensor& a, const Tensor& y, const Tensor& x);

// A block and what goes in, in F64. A rotated residual stream with one huge channel is huge in all
// of them: in F32 its rounding is more than a block's update may be off.
struct WideBlock {
  std::unique_ptr<nn::Block> block;
  Tensor x;
  nn::Positions at;
};
WideBlock in_f64(const nn::Block& block, const AuditInputs& in);

// A block and its inputs as the recipe's rotation leaves them; without one, as they are.
struct RotatedSubject {
  std::unique_ptr<nn::Block> fp;
  AuditInputs in;
};
RotatedSubject rotated(const Recipe& recipe, const nn::Block& fp, const AuditInputs& in);

void audit_rotations(const nn::Block& fp, int index, const AuditInputs& in, uint64_t seed,
                     const Found& found);
void audit_gradients(const Subject& s, const Found& found);
void audit_transforms(const Subject& s, const Found& found);
void audit_packing(const Subject& s, const Found& found);

}  // namespace omq::quant::detail
