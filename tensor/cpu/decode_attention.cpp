// DecodeAttention on the CPU.
#include "tensor/decode_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tensor/cpu/loops.h"
#include "tensor/cpu/packed_isa.h"
#include "tensor/numeric.h"

namespace omq {

namespace {

constexpr int64_t kRun = 256;      // keys of a task
constexpr int64_t kAlone = 32768;  // products; below, waking a thread costs more than it saves

constexpr int64_t kAtOnce = 8;  // rows that become F32 together

// Rows (token, head) of a sequence's cache; what is not stored as F32 is made in `scratch`.
class Rows {
 public:
  Rows(const CachedRows& c, int64_t sequence, int64_t kv_heads, int64_t d)
      : kv_heads_(kv_heads), d_(d), bytes_(c.floats.defined() ? 0 : c.codes.code_bytes()) {
    const Tensor& stored = c.floats.defined() ? c.floats : c.codes.codes;
    const int64_t first = sequence * stored.dim(1) * kv_heads;
    if (!c.floats.defined()) {
      codes_ = c.codes.codes.data<uint8_t>() + first * bytes_;
      grid_ = c.codes.grid.data<float>() + 2 * first;
      paired_ = c.codes.paired;
    } else if (c.floats.dtype() == DType::F16) {
      halves_ = c.floats.data<f16_t>() + first * d;
      widen_ = cpu::active_packed_isa().widen;
    } else {
      floats_ = c.floats.data<float>() + first * d;
    }
  }
  // A head's rows at a time, at most, and the floats between them.
  int64_t at_once(int64_t all) const { return floats_ ? all : kAtOnce; }
  int64_t step() const { return floats_ ? kv_heads_ * d_ : d_; }
  // Rows of a head from `token` on, n ≤ at_once; scratch [kAtOnce, d].
  const float* at(int64_t token, int64_t n, int64_t head, float* scratch) const {
    const int64_t row = token * kv_heads_ + head;
    if (floats_) return floats_ + row * d_;
    for (int64_t i = 0; i < n; ++i) widen(row + i * kv_heads_, scratch + i * d_);
    return scratch;
  }

 private:
  void widen(int64_t row, float* out) const {
    if (halves_) return widen_(halves_ + row * d_, cpu::Stored::F16, out, d_);
    const uint8_t* codes = codes_ + row * bytes_;
    const float scale = grid_[2 * row], zero = grid_[2 * row + 1];
    if (!paired_) {
      for (int64_t i = 0; i < d_; ++i) out[i] = (static_cast<float>(codes[i]) - zero) * scale;
      return;
    }
    for (int64_t i = 0; i < d_ / 2; ++i) {
      out[2 * i] = (static_cast<float>(codes[i] & 15) - zero) * scale;
      out[2 * i + 1] = (static_cast<float>(codes[i] >> 4) - zero) * scale;
    }
    if (d_ % 2) out[d_ - 1] = (static_cast<float>(codes[d_ / 2] & 15) - zero) * scale;
  }

  const float* floats_ = nullptr;
  const f16_t* halves_ = nullptr;
  void (*widen_)(const void*, cpu::Stored, float*, int64_t) = nullptr;
  const uint8_t* codes_ = nullptr;
  const float* grid_ = nullptr;
  bool paired_ = false;
  int64_t kv_heads_, d_, bytes_;
};

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }  // floats to whole cache lines

// Vectors by name: left to the compiler, sums would go through memory at every step.
using Eight = float __attribute__((vector_size(32)));
using Four = float __attribute__((vector_size(16)));

// scale · (q · kᵀ) for n rows of k. Sums in the order of lane_sum.
void dots(const float* q, const float* k, int64_t step, int64_t n, int64_t d, float scale,
          float* scores) {
  for (int64_t s = 0; s < n; ++s, k += step) {
    if (d % 8 != 0) {
      scores[s] = scale * cpu::lane_sum<float>(d, [q, k](int64_t i) { return q[i] * k[i]; });
      continue;
    }
    Eight sum{};
    for (int64_t i = 0; i < d; i += 8) {
      Eight a, b;
      std::memcpy(&a, q + i, sizeof a);
      std::memcpy(&b, k + i, sizeof b);
      sum += a * b;
    }
    Four half[2];
    std::memcpy(half, &sum, sizeof half);
    const Four t = half[0] + half[1];
    scores[s] = scale * ((t[0] + t[2]) + (t[1] + t[3]));
  }
}

// y [kStrip] += p [n] · the columns of n rows of v that begin at v.
constexpr int kStrip = 64;
void add_strip(const float* p, const float* v, int64_t step, int64_t n, float* y) {
  Eight sum[kStrip / 8];
  std::memcpy(sum, y, sizeof sum);
  for (int64_t s = 0; s < n; ++s, v += step) {
    const float weight = p[s];
#pragma GCC unroll 8
    for (int j = 0; j < kStrip / 8; ++j) {
      Eight value;
      std::memcpy(&value, v + 8 * j, sizeof value);
      sum[j] += weight * value;
    }
  }
  std::memcpy(y, sum, sizeof sum);
}

// y [d] += p [n] · n rows of v.
void add_weighted(const float* p, const float* v, int64_t step, int64_t n, int64_t d, float* y) {
  if (d % kStrip == 0) {
    for (int64_t i = 0; i < d; i += kStrip) add_strip(p, v + i, step, n, y + i);
    return;
  }
  for (int64_t s = 0; s < n; ++s, v += step)
    for (int64_t i = 0; i < d; ++i) y[i] += p[s] * v[i];
}

}  // namespace

struct DecodeAttention::Impl {
  int64_t batch, heads, kv_heads, d, group, runs;
  // A slot a task: what it found of each of its query heads (its y [d], the largest score, Σ exp),
  // then a few rows of floats and the scores.
  int64_t found_floats, slot_floats;
  Tensor slots;

  float* slot(int64_t task) const { return slots.data<float>() + task * slot_floats; }
  void run(const float* q, const Rows& k, const Rows& v, int64_t head, int64_t begin, int64_t n,
           float* slot) const;
  void join(int64_t sequence, int64_t head, int64_t used, float* y) const;
};

// Attention to keys begin … begin + n − 1 alone, as the general kernel forms it (attention.cpp,
// plain_row), so that up to kRun keys give its bits. q: of the query heads that share this head.
void DecodeAttention::Impl::run(const float* q, const Rows& k, const Rows& v, int64_t head,
                                int64_t begin, int64_t n, float* at) const {
  float* scratch = at + group * found_floats;
  float* scores = scratch + kAtOnce * padded(d);
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)));
  for (int64_t s = 0, rows = 0; s < n; s += rows) {
    rows = std::min(k.at_once(n), n - s);
    const float* keys = k.at(begin + s, rows, head, scratch);
    for (int64_t g = 0; g < group; ++g)
      dots(q + g * d, keys, k.step(), rows, d, scale, scores + g * kRun + s);
  }
  for (int64_t g = 0; g < group; ++g) {
    float *p = scores + g * kRun, *y = at + g * found_floats;
    const float top = cpu::lane_max<float>(n, p[0], [p](int64_t i) { return p[i]; });
    for (int64_t i = 0; i < n; ++i) p[i] = exp_fast(p[i] - top);
    const float total = cpu::lane_sum<float>(n, [p](int64_t i) { return p[i]; });
    for (int64_t i = 0; i < n; ++i) p[i] /= total;
    std::fill_n(y, d, 0.0f);
    y[d] = top, y[d + 1] = total;
  }
  for (int64_t s = 0, rows = 0; s < n; s += rows) {
    rows = std::min(v.at_once(n), n - s);
    const float* values = v.at(begin + s, rows, head, scratch);
    for (int64_t g = 0; g < group; ++g)
      add_weighted(scores + g * kRun + s, values, v.step(), rows, d, at + g * found_floats);
  }
}

// The runs of one sequence's key/value head, in order.
void DecodeAttention::Impl::join(int64_t sequence, int64_t head, int64_t used, float* y) const {
  for (int64_t g = 0; g < group; ++g) {
    const auto found = [&](int64_t r) {
      return slot((sequence * used + r) * kv_heads + head) + g * found_floats;
    };
    float* out = y + (sequence * heads + head * group + g) * d;
    std::copy_n(found(0), d, out);
    float top = found(0)[d], total = found(0)[d + 1];
    for (int64_t r = 1; r < used; ++r) {
      const float* part = found(r);
      const float higher = std::max(top, part[d]);
      const float before = total * exp_fast(top - higher),
                  more = part[d + 1] * exp_fast(part[d] - higher);
      top = higher;
      total = before + more;
      const float keep = before / total, add = more / total;
      for (int64_t i = 0; i < d; ++i) out[i] = out[i] * keep + part[i] * add;
    }
  }
}

DecodeAttention::DecodeAttention(int64_t heads, int64_t kv_heads, int64_t head_dim,
                                 int64_t capacity, int64_t batch)
    : impl_(std::make_unique<Impl>()) {
  check(kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && head_dim > 0 && capacity > 0 &&
            batch > 0,
        "decode attention: {} heads over {} of {} values, {} tokens of {} sequences", heads,
        kv_heads, head_dim, capacity, batch);
  Impl& m = *impl_;
  m.batch = batch;
  m.heads = heads, m.kv_heads = kv_heads, m.d = head_dim, m.group = heads / kv_heads;
  m.runs = (capacity + kRun - 1) / kRun;
  m.found_floats = padded(head_dim + 2);
  m.slot_floats = m.group * (m.found_floats + kRun) + kAtOnce * padded(head_dim);
  m.slots = Tensor::zeros({batch * m.runs * kv_heads, m.slot_floats});
}
DecodeAttention::~DecodeAttention() = default;
DecodeAttention::DecodeAttention(DecodeAttention&&) noexcept = default;

void DecodeAttention::operator()(const float* q, const CachedRows& k, const CachedRows& v,
                                 int64_t length, float* y) {
  const Impl& m = *impl_;
  check(length > 0 && length <= m.runs * kRun, "decode attention: {} tokens, room for {}", length,
        m.runs * kRun);
  for (const CachedRows* c : {&k, &v}) {
    const Tensor& stored = c->floats.defined() ? c->floats : c->codes.codes;
    check(stored.dim(0) == m.batch && stored.dim(1) >= length,
          "decode attention: {} tokens of {} sequences, the cache is {}", length, m.batch,
          stored.shape());
  }
  const int64_t used = (length + kRun - 1) / kRun, each = used * m.kv_heads, tasks = m.batch * each;
  const bool alone = m.batch * length * m.heads * m.d < kAlone;
  parallel_for(tasks, alone ? tasks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sequence = task / each, at = task % each / m.kv_heads * kRun;
      const int64_t head = task % m.kv_heads;
      const Rows keys(k, sequence, m.kv_heads, m.d), values(v, sequence, m.kv_heads, m.d);
      m.run(q + (sequence * m.heads + head * m.group) * m.d, keys, values, head, at,
            std::min(kRun, length - at), m.slot(task));
    }
  });
  for (int64_t sequence = 0; sequence < m.batch; ++sequence)
    for (int64_t head = 0; head < m.kv_heads; ++head) m.join(sequence, head, used, y);
}

}  // namespace omq
