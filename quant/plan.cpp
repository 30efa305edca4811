// See plan.h.
#include "quant/plan.h"

#include <algorithm>

#include "tensor/error.h"

namespace omq::quant {
namespace {

// One learning step of a block, in bytes.
size_t step_bytes(const Recipe& r, const PlanShapes& s, bool gpu) {
  const int64_t operand = gpu && r.train.compute != Compute::F32 ? 2 : 4;
  const bool learns = r.train.epochs > 0, transforms = !r.transforms.empty();
  const int64_t rows = s.tokens * r.train.batch_size;
  int64_t weights = 0, groups = 0, largest = 0, kept = 0, widest = 0;
  for (const auto& [out, in] : s.linears) {
    weights += out * in;
    groups += out * r.spec.weight().groups(in);
    largest = std::max(largest, out * in);
    kept += operand * in + 4 * out;  // what the product read and wrote, until its gradient
    widest = std::max(widest, out);
  }
  int64_t bytes = 4 * weights + operand * weights;  // W, and W on its grid
  if (transforms) bytes += 4 * weights;             // W transformed
  // Products of the factors with W, and of the scales before them; and of what goes online.
  if (r.kronecker) bytes += 3 * 4 * weights + rows * 4 * (6 * s.hidden + 3 * widest);
  if (learns) bytes += 4 * largest * (transforms ? 3 : 1);  // gradients, matrix by matrix
  if (learns) bytes += 2 * 4 * groups * 6;                  // u, l: moments, gradients, grid
  // Matrices of weights or of offsets that learn: themselves, gradients, two moments.
  if (r.train.weights || r.train.rounding) bytes += 4 * 4 * weights;
  bytes += rows * kept;                             // one forward
  bytes += rows * 4 * (8 * s.hidden + 3 * widest);  // residuals; gradients on the way
  return static_cast<size_t>(bytes);
}

double gib(size_t bytes) { return static_cast<double>(bytes) / double{1 << 30}; }

}  // namespace

MemoryPlan plan_memory(const Recipe& recipe, const PlanShapes& shapes, Device device,
                       size_t limit) {
  const bool gpu = device.type == DeviceType::CUDA;
  MemoryPlan p;
  p.block = step_bytes(recipe, shapes, gpu) / 8 * 9;  // what the estimate does not know of
  const int streams = recipe.train.epochs == 0 ? 3 : recipe.objective.wants_of_quant ? 4 : 3;
  p.samples = static_cast<size_t>(streams * shapes.windows * shapes.tokens * shapes.hidden * 4);
  const size_t room = device_api(device).memory_limit(device.index);
  if (limit == 0 || (room != 0 && room < limit)) limit = room;
  if (limit == 0) return p;
  p.samples_on_host = gpu && p.block + p.samples > limit;
  check(p.on_device() <= limit,
        "about {:.1f} GiB are needed ({:.1f} for a block, {:.1f} for samples), {:.1f} may be used; "
        "shorter or fewer windows need less (--seqlen, --nsamples)",
        gib(p.on_device()), gib(p.block), gib(p.samples_on_host ? 0 : p.samples), gib(limit));
  return p;
}

}  // namespace omq::quant
