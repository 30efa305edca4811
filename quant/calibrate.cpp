// The block loop. Letters as in nn/README.md; N samples.
#include "quant/calibrate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>

#include "autograd/ops.h"
#include "nn/packed_weight.h"
#include "quant/activations.h"
#include "quant/learn.h"
#include "quant/linear_report.h"
#include "quant/recovery.h"

namespace omq::quant {
namespace {

constexpr int64_t kStartTokens = 512;  // that a clip's start is chosen on

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Samples [begin, end) of a stream [N,T,D].
Tensor batch_of(const Tensor& stream, int64_t begin, int64_t end) {
  return slice(stream, 0, begin, end);
}

// The block on every sample: [N,T,D] → [N,T,D]. The streams lie with the block, or in host memory
// and come to it window by window.
Tensor run(const nn::Block& block, const Tensor& stream, const nn::Positions& at,
           const Hooks& hooks) {
  NoGrad off;
  const Device device = at.index.device();
  Tensor out = stream.device() == device ? empty_like(stream)
                                         : empty_pinned(stream.shape(), stream.dtype(), device);
  for (int64_t i = 0; i < stream.dim(0); ++i) {
    if (hooks.poll) hooks.poll();
    const Tensor y = block.forward(to(batch_of(stream, i, i + 1), device), at);
    Tensor window = slice(out, 0, i, i + 1);
    if (window.device() == device)
      on(out).copy(window, y);
    else
      transfer(window, y);
  }
  return out;
}

// Mean over the samples of what `measure` gives for a window [1,T,D] of one or two streams.
template <class F, class... S> double mean_over(F&& measure, const S&... streams) {
  NoGrad off;
  double total = 0;
  const int64_t n = std::get<0>(std::tie(streams...)).dim(0);
  for (int64_t i = 0; i < n; ++i)
    total += static_cast<double>(measure(batch_of(streams, i, i + 1)...).template item<float>());
  return total / static_cast<double>(n);
}

// One Storage a tensor, so that the streams of a run stay three.
struct Streams {
  Tensor fp, quant;  // X, X_quant: [N,T,D]
};

}  // namespace

std::vector<Tensor> linear_inputs(const nn::Block& block, const Tensor& x,
                                  const nn::Positions& at) {
  const auto watched = block.clone();
  const auto linears = watched->linears();
  std::vector<Tensor> inputs(linears.size());
  for (size_t i = 0; i < linears.size(); ++i)
    linears[i].linear->pre = [&seen = inputs[i], pre = linears[i].linear->pre](
                                 const Tensor& input) { return seen = pre ? pre(input) : input; };
  watched->forward(x, at);
  return inputs;
}

double packed_error(const BlockMethod::Committed& block, const std::vector<Tensor>& inputs) {
  const auto dense = block.simulated->linears(), packed = block.packed->linears();
  double worst = 0;
  for (size_t i = 0; i < dense.size(); ++i) {
    const nn::Linear a = dense[i].linear->product(), b = packed[i].linear->product();
    const Tensor rows = reshape(inputs[i], {-1, inputs[i].dim(-1)});
    for (const int64_t tokens : {1, 64}) {  // decoding, and prefill
      const Tensor x = to(slice(rows, 0, 0, std::min(tokens, rows.dim(0))), Device{});
      const Tensor y = a(x);
      const auto difference = static_cast<double>(sum(square(b(x) - y)).item<float>());
      const auto power = static_cast<double>(sum(square(y)).item<float>());
      const double error = std::sqrt(difference / std::max(power, 1e-30));
      if (error <= worst) continue;
      worst = error;  // also when it is no number
      check(error < kPackedError,
            "{}: the packed matrix differs from the simulated one by {:.2e}; this is a fault of a "
            "packed kernel (try OMQ_ISA=scalar)",
            dense[i].name, error);
    }
  }
  return worst;
}

namespace {

// What every block of a run is calibrated with.
struct Job {
  const Recipe& recipe;
  const Hooks& hooks;
  const Progress& progress;
  Device device;     // where blocks compute
  nn::Positions at;  // there
  int blocks = 0;
};

// What codes are chosen on; nothing without text.
std::optional<CommitData> commit_data(const Job& job, const Streams* streams) {
  if (!streams) return std::nullopt;
  return CommitData{streams->quant, job.at, job.hooks.poll};
}

// ⑤ and ⑥: the block with its learnables fixed, and the streams behind it.
struct Outcome {
  BlockMethod::Committed committed;
  Streams next;
  BlockReport report;
};

// host: the method with its final learnables and the block, both in host memory. Codes are chosen
// there wherever learning took place, so that they are a function of the learnables alone.
Outcome finish(const Job& job, const BlockMethod& host, const nn::Block& fp, const Streams* streams,
               const Targets& targets, BlockReport report) {
  NoGrad off;
  const auto data = commit_data(job, streams);
  Outcome out{host.commit(fp, data ? &*data : nullptr), {}, std::move(report)};
  const auto simulated = out.committed.simulated->clone();
  move_to(*simulated, job.device);
  const Tensor sample = streams ? to(batch_of(streams->quant, 0, 1), job.device) : Tensor{};
  BlockReport& r = out.report;
  report_linears(job.recipe, host, fp, *simulated, sample, job.at, r);
  if (!streams) return out;
  out.next = {targets.of_fp, run(*simulated, streams->quant, job.at, job.hooks)};
  r.committed_loss = mean_over(mse, out.next.quant, out.next.fp);
  r.target_mean_square = mean_over([](const Tensor& y) { return mean(square(y)); }, out.next.fp);
  check(std::isfinite(r.committed_loss), "the committed block's output is not finite");
  r.packed_error = packed_error(out.committed, linear_inputs(*simulated, sample, job.at));
  return out;
}

// The block as an earlier run left it, made again; nothing when it does not come out the same.
std::optional<Outcome> restore(const Job& job, nn::Block& fp, const Streams* streams,
                               const Targets& targets, const BlockStats& stats,
                               FinishedBlock saved) {
  const BlockMethod host(job.recipe, fp, stats);
  const int index = saved.report.index;
  std::optional<Outcome> out;
  if (assign(host.learnables(), saved.learnables))
    out = finish(job, host, fp, streams, targets, std::move(saved.report));
  // The bytes decide: sums in another order, on another kind of machine, give another loss.
  if (out && job.hooks.store->confirms(index, *out->committed.packed)) {
    out->report.restored = true;
    return out;
  }
  if (job.hooks.notice)
    job.hooks.notice("a stored block does not give what it gave then; it is calibrated again");
  return std::nullopt;
}

// Where the first tokens of a window stand.
nn::Positions first(const nn::Positions& at, int64_t tokens) {
  return {slice(at.index, 0, 0, tokens), at.tables};
}

// Starts and learns on the device where the block is.
void learn_there(const Job& job, const BlockMethod& method, nn::Block& block,
                 const Streams& streams, const Targets& targets, BlockReport& report,
                 const std::chrono::steady_clock::time_point start) {
  if (method.starts_from_inputs()) {
    const int64_t tokens = std::min(streams.quant.dim(1), kStartTokens);
    const Tensor window = slice(batch_of(streams.quant, 0, 1), 1, 0, tokens);
    method.start(block, to(window, job.device), first(job.at, tokens));
  }
  if (job.recipe.train.epochs > 0)
    learn(job.recipe, method, block,
          {job.recipe.train.full_inputs ? streams.fp : streams.quant, targets, job.at, job.blocks},
          job.hooks, job.progress, report, start);
}

// The method with all that is learned, in host memory; fp is there already.
BlockMethod learned(const Job& job, nn::Block& fp, const Streams& streams, const Targets& targets,
                    const BlockStats& stats, nn::Block& on_device, BlockReport& report,
                    const std::chrono::steady_clock::time_point start) {
  BlockMethod host(job.recipe, fp, stats);
  if (job.recipe.train.epochs == 0 && !host.starts_from_inputs()) return host;
  const bool rounds_first = job.recipe.train.after_rounding;
  if (rounds_first) {
    const auto data = commit_data(job, &streams);
    host.fix_rounding(fp, &*data);
  }
  if (job.device == Device{}) {
    learn_there(job, host, fp, streams, targets, report, start);
    return host;
  }
  BlockMethod there(job.recipe, on_device, stats);
  if (rounds_first) there.take_rounding(host, job.device);
  learn_there(job, there, on_device, streams, targets, report, start);
  assign(host.learnables(), there.learnables());
  return host;
}

Outcome quantize_block(const Job& job, nn::Block& fp, const Streams* streams, BlockReport report,
                       std::optional<FinishedBlock> saved) {
  const auto start = std::chrono::steady_clock::now();
  const DeviceApi& api = device_api(job.device);
  api.reset_memory_peak(job.device.index);
  const bool learns = job.recipe.train.epochs > 0;
  const auto there = fp.clone();  // where blocks compute; on the CPU it shares all of fp
  move_to(*there, job.device);
  if (job.device.type != DeviceType::CPU) narrow_exact(*there);  // read at every step
  Targets targets;
  BlockStats stats;
  if (streams) {  // ① F(W, X)
    const auto watched = there->clone();
    StatsCollector collector(*watched);
    targets.of_fp =
        run(job.recipe.transforms.empty() ? *there : *watched, streams->fp, job.at, job.hooks);
    stats = collector.take();
  }
  if (saved)
    if (auto out = restore(job, fp, streams, targets, stats, std::move(*saved)))
      return std::move(*out);
  if (learns && job.recipe.objective.wants_of_quant)
    targets.of_quant = run(*there, streams->quant, job.at, job.hooks);
  const BlockMethod method =  // Θ₁: clipping, Θ₂: transforms
      streams ? learned(job, fp, *streams, targets, stats, *there, report, start)
              : BlockMethod(job.recipe, fp, stats);
  Outcome out = finish(job, method, fp, streams, targets, std::move(report));
  out.report.seconds = seconds_since(start);
  out.report.peak_bytes = api.memory(job.device.index).peak;
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
  check(streaming || (recipe.train.epochs == 0 && !recipe.clip_search),
        "method {}: learning needs calibration text", recipe.name);
  Streams streams;
  Job job{recipe, hooks, progress, data.device, {}, source.size()};
  if (streaming) {
    check(data.ids.dim(0) >= recipe.train.batch_size,
          "{} calibration windows, a step takes {} (--nsamples, --batch-size)", data.ids.dim(0),
          recipe.train.batch_size);
    NoGrad off;
    streams.fp = source.embed(data.ids);
    if (!data.samples_on_host) {
      streams.fp = to(streams.fp, data.device);
    } else if (data.device != Device{}) {
      const Tensor pinned = empty_pinned(streams.fp.shape(), streams.fp.dtype(), data.device);
      transfer(pinned, contiguous(streams.fp));
      streams.fp = pinned;
    }
    streams.quant = streams.fp;
    const nn::RopeTables tables = source.rope(data.ids.dim(1));
    job.at = nn::positions(0, data.ids.dim(1),
                           {to(tables.cos, data.device), to(tables.sin, data.device)});
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
