// The block loop. Letters as in nn/README.md; N samples.
#include "quant/calibrate.h"

#include <chrono>
#include <cmath>
#include <optional>

#include "autograd/ops.h"
#include "nn/packed_weight.h"
#include "quant/activations.h"
#include "quant/recovery.h"

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
Tensor run(const nn::Block& block, const Tensor& stream, const nn::Positions& at,
           const Hooks& hooks) {
  NoGrad off;
  Tensor out = empty_like(stream);
  for (int64_t i = 0; i < stream.dim(0); ++i) {
    if (hooks.poll) hooks.poll();
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

// How far the packed kernels are from the simulated matrices, as a share of their outputs, on the
// inputs that each linear has in the simulated block on sample x; where these are quantised, it is
// the product in integers against the simulated one. Linear by linear, since a code of an
// activation that falls to the other side of a tie is no fault. Rounding alone gives about 1e-6;
// anything large is a fault, and must not reach a file.
double packed_error(const BlockMethod::Committed& block, const Tensor& x, const nn::Positions& at) {
  const auto watched = block.simulated->clone();
  const auto dense = watched->linears(), packed = block.packed->linears();
  std::vector<Tensor> inputs(dense.size());
  for (size_t i = 0; i < dense.size(); ++i)
    dense[i].linear->pre = [&seen = inputs[i], pre = dense[i].linear->pre](const Tensor& input) {
      return seen = pre ? pre(input) : input;
    };
  watched->forward(x, at);
  double worst = 0;
  for (size_t i = 0; i < dense.size(); ++i) {
    nn::Linear a = *dense[i].linear, b = *packed[i].linear;
    a.pre = b.pre = {};
    const Tensor y = a(inputs[i]);
    const auto difference = static_cast<double>(sum(square(b(inputs[i]) - y)).item<float>());
    const auto power = static_cast<double>(sum(square(y)).item<float>());
    const double error = std::sqrt(difference / std::max(power, 1e-30));
    if (error <= worst) continue;
    worst = error;  // also when it is no number
    check(error < 1e-3,
          "{}: the packed matrix differs from the simulated one by {:.2e}; this is a fault of a "
          "packed kernel (try OMQ_ISA=scalar)",
          dense[i].name, error);
  }
  return worst;
}

// What every block of a run is calibrated with.
struct Job {
  const Recipe& recipe;
  const Hooks& hooks;
  const Progress& progress;
  nn::Positions at;
};

Targets batch_of(const Targets& t, int64_t begin, int64_t end) {
  return {batch_of(t.of_fp, begin, end),
          t.of_quant.defined() ? batch_of(t.of_quant, begin, end) : Tensor{}};
}

struct Epoch {
  double loss = 0;      // mean of its steps
  int64_t failed = -1;  // first sample of the step that gave no number; nothing was learned from it
};

Epoch train_epoch(const Job& job, const BlockMethod& method, const nn::Block& fp,
                  nn::AdamW& optimizer, const Tensor& x, const Targets& targets) {
  const ComputeScope compute(job.recipe.train.compute);
  double total = 0;
  const int64_t n = x.dim(0), step = job.recipe.train.batch_size;
  for (int64_t i = 0; i + step <= n; i += step) {
    if (job.hooks.poll) job.hooks.poll();
    const auto block = method.quantized(fp);
    const Tensor loss = job.recipe.objective.loss(block->forward(batch_of(x, i, i + step), job.at),
                                                  batch_of(targets, i, i + step));
    const auto value = static_cast<double>(loss.item<float>());
    if (!std::isfinite(value)) return {value, i};
    total += value;
    optimizer.step(backward(loss));
  }
  for (const Learnable& l : method.learnables())
    if (!all_finite(l.value)) return {total, 0};
  return {total / static_cast<double>(n / step)};
}

// ②–④, and the way back when a number is none: recovery.h.
void learn(const Job& job, const BlockMethod& method, nn::Block& fp, const Tensor& x,
           const Targets& targets, BlockReport& report,
           const std::chrono::steady_clock::time_point start) {
  const auto learnables = method.learnables();
  const int64_t step = job.recipe.train.batch_size;
  double factor = 1;
  std::optional<nn::AdamW> optimizer(method.param_groups());
  for (int epoch = 1; epoch <= job.recipe.train.epochs; ++epoch) {
    const Snapshot before(learnables);
    for (;;) {
      const Epoch e = train_epoch(job, method, fp, *optimizer, x, targets);
      if (e.failed < 0) {
        report.epoch_loss.push_back(e.loss);
        break;
      }
      const ComputeScope compute(job.recipe.train.compute);
      NoGrad off;
      const Culprit why = first_not_finite(fp, *method.quantized(fp), learnables,
                                           batch_of(x, e.failed, e.failed + step),
                                           batch_of(targets, e.failed, e.failed + step), job.at);
      check(!why.hopeless,
            "epoch {}: the loss is not finite, and no learning rate changes that: {}", epoch,
            why.tensor);
      check(report.recoveries.size() < kTries,
            "epoch {}: the loss is not finite, after {} tries at lower rates still; it begins in: "
            "{}; lower the learning rate",
            epoch, kTries, why.tensor);
      before.restore();
      factor /= 2;
      report.recoveries.push_back({epoch, factor, why.tensor});
      if (job.hooks.notice)
        job.hooks.notice(fmt::format(
            "{}: epoch {}: the loss is not finite ({}); back to the start of the epoch, learning "
            "rates times {}",
            report.name, epoch, why.tensor, factor));
      optimizer.emplace(method.param_groups());
      optimizer->set_lr_factor(factor);
    }
    report.seconds = seconds_since(start);
    if (job.progress) job.progress(report, epoch, job.recipe.train.epochs);
  }
}

}  // namespace

BlockMethod::BlockMethod(const Recipe& recipe, nn::Block& fp, const BlockStats& stats)
    : recipe_(recipe) {
  for (const auto& make : recipe.transforms) transforms_.push_back(make(fp, stats));
  for (const auto& [name, linear] : fp.linears()) {
    clips_.push_back(recipe.clip(linear->dense(), recipe.spec.weight()));
    linears_.push_back(name);
  }
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

std::vector<Learnable> BlockMethod::learnables() const {
  std::vector<Learnable> all;
  auto add = [&all](const std::string& owner, const nn::ParamGroup& g) {
    for (size_t i = 0; i < g.params.size(); ++i)
      all.push_back({fmt::format("{}.{}.{}", owner, g.name,
                                 i < g.names.size() ? g.names[i] : std::to_string(i)),
                     g.params[i]});
  };
  for (size_t i = 0; i < transforms_.size(); ++i)
    add(fmt::format("transform{}", i), transforms_[i]->params());
  for (size_t i = 0; i < clips_.size(); ++i) add(linears_[i], clips_[i]->params());
  return all;
}

std::unique_ptr<nn::Block> BlockMethod::transformed(const nn::Block& fp) const {
  auto block = fp.clone();
  for (const auto& t : transforms_) {
    t->project();
    t->apply(*block);
  }
  quantize_activations(*block, recipe_.spec);
  return block;
}

std::unique_ptr<nn::Block> BlockMethod::quantized(const nn::Block& fp) const {
  auto block = transformed(fp);
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
  Committed out{transformed(fp), nullptr};
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

// ⑤ and ⑥: the block with its learnables fixed, and the streams behind it.
struct Outcome {
  BlockMethod::Committed committed;
  Streams next;
  BlockReport report;
};

Outcome finish(const Job& job, const BlockMethod& method, const nn::Block& fp,
               const Streams* streams, const Targets& targets, BlockReport report) {
  NoGrad off;
  Outcome out{method.commit(fp), {}, std::move(report)};
  if (!streams) return out;
  BlockReport& r = out.report;
  out.next = {targets.of_fp, run(*out.committed.simulated, streams->quant, job.at, job.hooks)};
  r.committed_loss = static_cast<double>(mse(out.next.quant, out.next.fp).item<float>());
  r.target_mean_square = static_cast<double>(mean(square(out.next.fp)).item<float>());
  check(std::isfinite(r.committed_loss), "the committed block's output is not finite");
  r.packed_error = packed_error(out.committed, batch_of(streams->quant, 0, 1), job.at);
  return out;
}

// The block as an earlier run left it, made again; nothing when it does not come out the same.
std::optional<Outcome> restore(const Job& job, nn::Block& fp, const Streams* streams,
                               const Targets& targets, const BlockStats& stats,
                               FinishedBlock saved) {
  const BlockMethod method(job.recipe, fp, stats);
  const double loss = saved.report.committed_loss;
  const int index = saved.report.index;
  std::optional<Outcome> out;
  if (assign(method.learnables(), saved.learnables))
    out = finish(job, method, fp, streams, targets, std::move(saved.report));
  if (out && out->report.committed_loss == loss &&
      job.hooks.store->confirms(index, *out->committed.packed)) {
    out->report.restored = true;
    return out;
  }
  if (job.hooks.notice)
    job.hooks.notice("a stored block does not give what it gave then; it is calibrated again");
  return std::nullopt;
}

Outcome quantize_block(const Job& job, nn::Block& fp, const Streams* streams, BlockReport report,
                       std::optional<FinishedBlock> saved) {
  const auto start = std::chrono::steady_clock::now();
  reset_cpu_memory_peak();
  const bool learns = job.recipe.train.epochs > 0;
  Targets targets;
  BlockStats stats;
  if (streams) {  // ① F(W, X)
    const auto watched = fp.clone();
    StatsCollector collector(*watched);
    targets.of_fp =
        run(job.recipe.transforms.empty() ? fp : *watched, streams->fp, job.at, job.hooks);
    stats = collector.take();
  }
  if (saved)
    if (auto out = restore(job, fp, streams, targets, stats, std::move(*saved)))
      return std::move(*out);
  if (learns && job.recipe.objective.wants_of_quant)
    targets.of_quant = run(fp, streams->quant, job.at, job.hooks);
  const BlockMethod method(job.recipe, fp, stats);  // Θ₁: clipping, Θ₂: transforms
  if (learns) learn(job, method, fp, streams->quant, targets, report, start);
  Outcome out = finish(job, method, fp, streams, targets, std::move(report));
  out.report.seconds = seconds_since(start);
  out.report.peak_bytes = cpu_memory_use().peak;
  if (job.hooks.store)
    job.hooks.store->save(out.report.index, {out.report, method.learnables()},
                          *out.committed.packed);
  return out;
}

}  // namespace

std::vector<BlockReport> quantize(nn::BlockSource& source, nn::BlockSink& sink,
                                  const Recipe& recipe, const CalibrationData& data,
                                  const Progress& progress, nn::BlockSink* simulated,
                                  const Hooks& hooks) {
  const bool streaming = data.ids.defined();
  check(streaming || recipe.train.epochs == 0, "method {}: learning needs calibration text",
        recipe.name);
  Streams streams;
  Job job{recipe, hooks, progress, {}};
  if (streaming) {
    check(data.ids.dim(0) >= recipe.train.batch_size, "{} calibration windows for a batch of {}",
          data.ids.dim(0), recipe.train.batch_size);
    NoGrad off;
    streams.fp = source.embed(data.ids);
    streams.quant = streams.fp;
    job.at = nn::positions(0, data.ids.dim(1), source.rope(data.ids.dim(1)));
  }
  std::vector<BlockReport> reports;
  bool stored = hooks.store != nullptr;  // up to the first block that is not
  for (int i = 0; i < source.size(); ++i)
    with_context(fmt::format("calibrating {}", source.name(i)), [&] {
      if (hooks.poll) hooks.poll();
      const auto fp = source.load(i);
      std::optional<FinishedBlock> saved;
      if (stored) saved = hooks.store->load(i);
      BlockReport report;
      report.index = i;
      report.name = source.name(i);
      Outcome out = quantize_block(job, *fp, streaming ? &streams : nullptr, std::move(report),
                                   std::move(saved));
      stored = stored && out.report.restored;
      sink.store(i, *out.committed.packed);
      if (simulated) simulated->store(i, *out.committed.simulated);
      streams = std::move(out.next);
      reports.push_back(std::move(out.report));
      if (progress) progress(reports.back(), -1, recipe.train.epochs);
    });
  return reports;
}

}  // namespace omq::quant
