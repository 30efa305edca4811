// The sampling chain. All arithmetic is in double, so that its order is the only thing that can
// matter.
#include "models/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "tensor/error.h"

namespace omq {
namespace {

constexpr double kForbidden = -std::numeric_limits<double>::infinity();

// Larger logit first, lower id on ties: a total order, so that no sort algorithm shows through.
bool before(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// Probabilities of sorted candidates at a temperature.
void softmax(std::vector<Candidate>& list, double temperature) {
  double sum = 0;
  for (Candidate& c : list)
    sum += c.probability = std::exp((c.logit - list.front().logit) / temperature);
  for (Candidate& c : list) c.probability /= sum;
}

void keep_top_k(std::vector<Candidate>& list, int64_t k) {
  const auto n = static_cast<int64_t>(list.size());
  if (k <= 0 || k >= n) {
    std::sort(list.begin(), list.end(), before);
    return;
  }
  std::partial_sort(list.begin(), list.begin() + k, list.end(), before);
  list.resize(static_cast<size_t>(k));
}

void keep_top_p(std::vector<Candidate>& list, double p) {
  if (p >= 1.0) return;
  softmax(list, 1.0);
  double sum = 0;
  for (size_t i = 0; i < list.size(); ++i) {
    sum += list[i].probability;
    if (sum >= p) {
      list.resize(i + 1);
      return;
    }
  }
}

void keep_min_p(std::vector<Candidate>& list, double p) {
  if (p <= 0.0) return;
  const double least = list.front().logit + std::log(p);
  while (list.size() > 1 && list.back().logit < least) list.pop_back();
}

}  // namespace

bool SamplerOptions::penalises() const {
  return repeat_last_n != 0 &&
         (repeat_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0);
}

bool SamplerOptions::takes_largest() const {
  return temperature == 0 && logit_bias.empty() && !penalises();
}

void SamplerOptions::validate(int64_t vocab_size) const {
  // Written so that NaN fails too.
  check(temperature >= 0 && temperature <= 1000, "--temp {} is outside 0…1000", temperature);
  check(top_k >= 0, "--top-k {} is negative; 0 keeps all tokens", top_k);
  check(top_p > 0 && top_p <= 1, "--top-p {} is outside (0, 1]", top_p);
  check(min_p >= 0 && min_p <= 1, "--min-p {} is outside [0, 1]", min_p);
  check(repeat_penalty > 0 && repeat_penalty <= 1000, "--repeat-penalty {} is outside (0, 1000]",
        repeat_penalty);
  check(repeat_last_n >= -1, "--repeat-last-n {}: a number of tokens, or -1 for all",
        repeat_last_n);
  check(std::abs(presence_penalty) <= 1000, "--presence-penalty {} is outside -1000…1000",
        presence_penalty);
  check(std::abs(frequency_penalty) <= 1000, "--frequency-penalty {} is outside -1000…1000",
        frequency_penalty);
  for (const auto& [id, bias] : logit_bias) {
    check(id >= 0 && id < vocab_size, "--logit-bias: token {} is outside the vocabulary of {}", id,
          vocab_size);
    check(!std::isnan(bias) && bias < std::numeric_limits<double>::infinity(),
          "--logit-bias: bias {} of token {}", bias, id);
  }
}

// splitmix64 spreads the seed over the state, as the authors of xoshiro advise.
Xoshiro256::Xoshiro256(uint64_t seed) : state_{} {
  for (uint64_t& word : state_) {
    seed += 0x9e3779b97f4a7c15u;
    uint64_t z = seed;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    word = z ^ (z >> 31);
  }
}

uint64_t Xoshiro256::next() {
  const uint64_t result = std::rotl(state_[0] + state_[3], 23) + state_[0];
  const uint64_t t = state_[1] << 17;
  state_[2] ^= state_[0];
  state_[3] ^= state_[1];
  state_[1] ^= state_[2];
  state_[0] ^= state_[3];
  state_[2] ^= t;
  state_[3] = std::rotl(state_[3], 45);
  return result;
}

Sampler::Sampler(SamplerOptions options) : options_(std::move(options)), random_(options_.seed) {}

void Sampler::adjust(std::span<const float> logits, std::span<const int32_t> history,
                     Work& work) const {
  std::vector<double>& x = work.logits;
  x.assign(logits.begin(), logits.end());
  for (size_t i = 0; i < x.size(); ++i)
    check(!std::isnan(x[i]),
          "sampling: the logit of token {} is NaN; the model's weights are broken", i);
  for (const auto& [id, bias] : options_.logit_bias)
    if (id >= 0 && static_cast<size_t>(id) < x.size()) x[static_cast<size_t>(id)] += bias;
  if (!options_.penalises()) return;
  const auto n = static_cast<int64_t>(history.size());
  const int64_t seen = options_.repeat_last_n < 0 ? n : std::min(n, options_.repeat_last_n);
  std::vector<int32_t>& recent = work.recent;
  if (options_.repeat_last_n > 0)
    recent.reserve(static_cast<size_t>(std::min<int64_t>(options_.repeat_last_n, 4096)));
  recent.assign(history.end() - seen, history.end());
  std::sort(recent.begin(), recent.end());
  for (size_t i = 0, next; i < recent.size(); i = next) {
    const int32_t id = recent[i];
    for (next = i; next < recent.size() && recent[next] == id; ++next) {
    }
    if (id < 0 || static_cast<size_t>(id) >= x.size()) continue;
    double& logit = x[static_cast<size_t>(id)];
    logit = logit > 0 ? logit / options_.repeat_penalty : logit * options_.repeat_penalty;
    logit -= options_.presence_penalty + options_.frequency_penalty * static_cast<double>(next - i);
  }
}

void Sampler::choose(std::span<const float> logits, std::span<const int32_t> history,
                     Work& work) const {
  adjust(logits, history, work);
  const std::vector<double>& x = work.logits;
  std::vector<Candidate>& list = work.list;
  list.clear();
  if (options_.temperature == 0) {
    const auto largest = std::max_element(x.begin(), x.end());  // the first of equals
    if (largest != x.end() && *largest > kForbidden)
      list.push_back({static_cast<int32_t>(largest - x.begin()), *largest, 1.0});
  } else {
    list.reserve(x.size());
    for (size_t i = 0; i < x.size(); ++i)
      if (x[i] > kForbidden) list.push_back({static_cast<int32_t>(i), x[i], 0.0});
  }
  check(!list.empty(), "sampling: every token is forbidden; see --logit-bias");
  if (options_.temperature == 0) return;
  keep_top_k(list, options_.top_k);
  keep_top_p(list, options_.top_p);
  keep_min_p(list, options_.min_p);
  softmax(list, options_.temperature);
}

std::vector<Candidate> Sampler::candidates(std::span<const float> logits,
                                           std::span<const int32_t> history) const {
  Work work;
  choose(logits, history, work);
  return std::move(work.list);
}

int32_t Sampler::sample(std::span<const float> logits, std::span<const int32_t> history) {
  choose(logits, history, work_);
  const std::vector<Candidate>& list = work_.list;
  if (options_.temperature == 0) return list.front().id;
  double left = random_.uniform();
  for (const Candidate& c : list) {
    left -= c.probability;
    if (left < 0) return c.id;
  }
  return list.back().id;  // rounding may leave the sum just below 1
}

void Sampler::take_numbers(std::span<double> numbers) {
  for (double& number : numbers) number = random_.uniform();
}

}  // namespace omq
