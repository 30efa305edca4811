// Statistics by a hook on the input of one consumer of each site.
#include "quant/stats.h"

#include "autograd/ops.h"

namespace omq::quant {
namespace {

nn::Linear* consumer_of(const nn::Site& site) {
  if (const auto* s = std::get_if<nn::NormToLinears>(&site)) return s->consumers.at(0);
  if (const auto* s = std::get_if<nn::LinearToLinear>(&site)) return s->consumer;
  if (const auto* s = std::get_if<nn::UpToDown>(&site)) return s->down;
  return nullptr;
}

void look(ChannelStats& s, const Tensor& x) {
  NoGrad off;
  const int64_t channels = x.dim(-1);
  const Range r = group_range(transpose(reshape(x, {-1, channels}), 0, 1), {.include_zero = false});
  const Tensor hi = reshape(r.hi, {channels}), lo = reshape(r.lo, {channels});
  const Tensor abs_max = maximum(hi, -lo), middle = (hi + lo) * 0.5;
  s.abs_max = s.abs_max.defined() ? maximum(s.abs_max, abs_max) : abs_max;
  s.middle = s.middle.defined() ? s.middle * 0.99 + middle * 0.01 : middle;
}

}  // namespace

StatsCollector::StatsCollector(nn::Block& block) : stats_(std::make_shared<BlockStats>()) {
  const std::vector<nn::Site> sites = block.sites();
  stats_->resize(sites.size());
  for (size_t i = 0; i < sites.size(); ++i)
    if (nn::Linear* consumer = consumer_of(sites[i]))
      consumer->pre = [stats = stats_, i, next = consumer->pre](const Tensor& x) {
        look(stats->at(i), x);
        return next ? next(x) : x;
      };
}

}  // namespace omq::quant
