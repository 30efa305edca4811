// The block loop. Letters as in nn/README.md; N samples.
#include "quant/calibrate.h"

#include <chrono>
#include <cmath>

#include "autograd/ops.h"
#include "nn/packed_weight.h"

namespace omq::quant {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Samples [begin, end) of a stream [N,T,D].
Tensor batch_of(const Tensor& stream, int64_t begin, int64_t end) {
  return slice(stream, 0, begin, end);
}

// The block on every sample: [N,T,D] → [N,T,D].
Tensor run(const nn::Block& block, const Tensor& stream, const nn::Positions& at) {
  NoGrad off;
  Tensor out = empty_like(stream);
  for (int64_t i = 0; i < stream.dim(0); ++i) {
    Tensor window = slice(out, 0, i, i + 1);
    on(out).copy(window, block.forward(batch_of(stream, i, i + 1), at));
  }
  return out;
}

// One Storage a tensor, so that the streams of a run stay three.
struct Streams {
  Tensor fp, quant;  // X, X_quant: [N,T,D]
};

Tensor f16_rounded(const Tensor& scale) { return to(to(scale, DType::F16), DType::F32); }

// On any device, in one pass: 0 · x is NaN where x is NaN or infinite.
bool all_finite(const Tensor& x) { return sum(x * 0.0).item<float>() == 0.0f; }

// Codes of w on its grid, packed. Scales become f16 values before codes are chosen.
std::shared_ptr<nn::PackedIntWeight> pack(const Tensor& w, Grid grid, const Rounder& rounder,
                                          const GroupSpec& spec) {
  check(all_finite(w), "a weight is not finite");
  check(all_finite(grid.scale), "the scales are not finite; lower the learning rate");
  grid.scale = f16_rounded(grid.scale);
  const Tensor codes = rounder.codes(w, grid, spec);
  return std::make_shared<nn::PackedIntWeight>(
      pack_codes(codes, grid.scale, grid.zero, stored_spec(spec)));
}

// How far the packed block's kernels are from the simulated block on one sample x, as a share of
// what the block adds to its input. Rounding alone gives about 1e-6; anything large is a fault, and
// must not reach a file.
double packed_error(const nn::Block& packed, const Tensor& x, const Tensor& y,
                    const nn::Positions& at) {
  const double difference =
      static_cast<double>(sum(square(packed.forward(x, at) - y)).item<float>());
  const double update = static_cast<double>(sum(square(y - x)).item<float>());
  const double error = std::sqrt(difference / std::max(update, 1e-30));
  check(error < 1e-3,
        "the packed block differs from the simulated one by {:.2e}; this is a fault of a packed "
        "kernel "
        "(try OMQ_ISA=scalar)",
        error);
  return error;
}

double train_epoch(const BlockMethod& method, const nn::Block& fp, const Recipe& recipe,
                   nn::AdamW& optimizer, const Tensor& x, const Targets& targets,
                   const nn::Positions& at) {
  const ComputeScope compute(recipe.train.compute);
  double total = 0;
  const int64_t n = x.dim(0), step = recipe.train.batch_size;
  for (int64_t i = 0; i + step <= n; i += step) {
    const auto block = method.quantized(fp);
    const Targets t{
        batch_of(targets.of_fp, i, i + step),
        recipe.objective.wants_of_quant ? batch_of(targets.of_quant, i, i + step) : Tensor{}};
    const Tensor loss = recipe.objective.loss(block->forward(batch_of(x, i, i + step), at), t);
    total += static_cast<double>(loss.item<float>());
    optimizer.step(backward(loss));
  }
  return total / static_cast<double>(n / step);
}

}  // namespace

BlockMethod::BlockMethod(const Recipe& recipe, nn::Block& fp) : recipe_(recipe) {
  for (const auto& make : recipe.transforms) transforms_.push_back(make(fp));
  for (const auto& [name, linear] : fp.linears())
    clips_.push_back(recipe.clip(linear->dense(), recipe.spec.weight()));
}

std::vector<nn::ParamGroup> BlockMethod::param_groups() const {
  std::vector<nn::ParamGroup> groups;
  auto add = [&](nn::ParamGroup g) {
    if (g.params.empty()) return;
    auto rate = recipe_.train.lr.find(g.name);
    check(rate != recipe_.train.lr.end(), "recipe {}: no learning rate for \"{}\"", recipe_.name,
          g.name);
    g.lr = rate->second;
    g.weight_decay = recipe_.train.weight_decay;
    groups.push_back(std::move(g));
  };
  for (const auto& t : transforms_) add(t->params());
  for (const auto& c : clips_) add(c->params());
  return groups;
}

std::unique_ptr<nn::Block> BlockMethod::quantized(const nn::Block& fp) const {
  auto block = fp.clone();
  for (const auto& t : transforms_) t->apply(*block);
  const auto linears = block->linears();
  for (size_t i = 0; i < linears.size(); ++i) {
    const Tensor w = linears[i].linear->dense();
    const Grid grid = clips_[i]->grid(w);
    linears[i].linear->weight = fake_quant(w, grid.scale, grid.zero, recipe_.spec.weight());
  }
  return block;
}

BlockMethod::Committed BlockMethod::commit(const nn::Block& fp) const {
  NoGrad off;
  Committed out{fp.clone(), nullptr};
  for (const auto& t : transforms_) t->apply(*out.simulated);
  out.packed = out.simulated->clone();
  const auto dense = out.simulated->linears(), packed = out.packed->linears();
  for (size_t i = 0; i < dense.size(); ++i) {
    const auto weight = with_context("packing " + dense[i].name, [&] {
      const Tensor w = dense[i].linear->dense();
      return pack(w, clips_[i]->grid(w), *recipe_.rounder, recipe_.spec.weight());
    });
    dense[i].linear->weight = weight->dequantize();
    packed[i].linear->weight = weight;
  }
  return out;
}

std::shared_ptr<nn::PackedWeight> pack_nearest(const Tensor& w, const QuantSpec& spec) {
  NoGrad off;
  const GroupSpec group = spec.weight();
  return pack(w, minmax_clip(w, group)->grid(w), *round_nearest(), group);
}

namespace {

BlockReport quantize_block(const Recipe& recipe, nn::Block& fp, Streams* streams,
                           const nn::Positions& at, BlockReport report, const Progress& progress,
                           BlockMethod::Committed& committed) {
  const auto start = std::chrono::steady_clock::now();
  reset_cpu_memory_peak();
  Targets targets;
  if (streams) {
    targets.of_fp = run(fp, streams->fp, at);  // ① F(W, X)
    if (recipe.objective.wants_of_quant && recipe.train.epochs > 0)
      targets.of_quant = run(fp, streams->quant, at);
  }
  const BlockMethod method(recipe, fp);  // Θ₁: clipping, Θ₂: transforms
  if (recipe.train.epochs > 0) {
    nn::AdamW optimizer(method.param_groups());
    for (int epoch = 1; epoch <= recipe.train.epochs; ++epoch) {
      const double loss =
          train_epoch(method, fp, recipe, optimizer, streams->quant, targets, at);  // ②–④
      check(std::isfinite(loss), "epoch {}: the loss is not finite; lower the learning rate",
            epoch);
      report.epoch_loss.push_back(loss);
      report.seconds = seconds_since(start);
      if (progress) progress(report, epoch, recipe.train.epochs);
    }
  }
  committed = method.commit(fp);  // ⑤ fold and choose codes
  if (streams) {
    NoGrad off;
    const Tensor input = batch_of(streams->quant, 0, 1);
    streams->quant = run(*committed.simulated, streams->quant, at);  // ⑥ the next block's inputs
    streams->fp = targets.of_fp;
    report.committed_loss = static_cast<double>(mse(streams->quant, streams->fp).item<float>());
    report.target_mean_square = static_cast<double>(mean(square(streams->fp)).item<float>());
    check(std::isfinite(report.committed_loss), "the committed block's output is not finite");
    report.packed_error =
        packed_error(*committed.packed, input, batch_of(streams->quant, 0, 1), at);
  }
  report.seconds = seconds_since(start);
  report.peak_bytes = cpu_memory_use().peak;
  return report;
}

}  // namespace

std::vector<BlockReport> quantize(nn::BlockSource& source, nn::BlockSink& sink,
                                  const Recipe& recipe, const CalibrationData& data,
                                  const Progress& progress, nn::BlockSink* simulated) {
  const bool streaming = data.ids.defined();
  check(streaming || recipe.train.epochs == 0, "method {}: learning needs calibration text",
        recipe.name);
  Streams streams;
  nn::Positions at;
  if (streaming) {
    check(data.ids.dim(0) >= recipe.train.batch_size, "{} calibration windows for a batch of {}",
          data.ids.dim(0), recipe.train.batch_size);
    NoGrad off;
    streams.fp = source.embed(data.ids);
    streams.quant = streams.fp;
    at = nn::positions(0, data.ids.dim(1), source.rope(data.ids.dim(1)));
  }
  std::vector<BlockReport> reports;
  for (int i = 0; i < source.size(); ++i)
    with_context(fmt::format("calibrating {}", source.name(i)), [&] {
      const auto fp = source.load(i);
      BlockMethod::Committed committed;
      BlockReport report;
      report.index = i;
      report.name = source.name(i);
      report = quantize_block(recipe, *fp, streaming ? &streams : nullptr, at, std::move(report),
                              progress, committed);
      sink.store(i, *committed.packed);
      if (simulated) simulated->store(i, *committed.simulated);
      reports.push_back(report);
      if (progress) progress(report, -1, recipe.train.epochs);
    });
  return reports;
}

}  // namespace omq::quant
