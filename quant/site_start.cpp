// See site_start.h.
#include "quant/site_start.h"

#include <algorithm>
#include <cmath>

#include "autograd/compute.h"
#include "autograd/ops.h"

namespace omq::quant {

std::vector<double> doubles(const Tensor& t) {
  return to(to(contiguous(t), Device{}), DType::F64).to_vector<double>();
}

Tensor parameter_of(const std::vector<double>& v, const Tensor& like) {
  const Tensor host = Tensor::from<double>(v, {static_cast<int64_t>(v.size())});
  return parameter(to(to(host, wide_dtype(like.dtype())), like.device()));
}

std::vector<double> column_max(const std::vector<const nn::Linear*>& readers, bool signed_max) {
  std::vector<double> w;
  for (const nn::Linear* l : readers) {
    const Tensor columns = transpose(l->dense(), 0, 1);
    const Range r = group_range(columns, {.include_zero = false});
    const std::vector<double> m = doubles(signed_max ? r.hi : maximum(r.hi, -r.lo));
    w.resize(m.size(), -1);
    for (size_t i = 0; i < m.size(); ++i) w[i] = std::max(w[i], m[i]);
  }
  return w;
}

// With the floors of spec omniquant §4.2.
std::vector<double> start_scale(const Tensor& abs_max, const std::vector<double>& w, double alpha) {
  check(abs_max.defined(),
        "the equivalent transformation starts from activations; give calibration text");
  std::vector<double> s = doubles(abs_max);
  check(s.size() == w.size(), "statistics of {} channels for a matrix of {}", s.size(), w.size());
  for (size_t i = 0; i < s.size(); ++i)
    s[i] = std::max(
        1e-5, std::pow(std::max(s[i], 1e-5), alpha) / std::pow(std::max(w[i], 1e-5), 1 - alpha));
  return s;
}

}  // namespace omq::quant
