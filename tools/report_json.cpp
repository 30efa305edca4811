// See report_json.h.
#include "tools/report_json.h"

#include <algorithm>
#include <cmath>

#include "models/json_file.h"
#include "tensor/error.h"

namespace omq {

using nlohmann::json;

namespace {

json histogram_json(const quant::Histogram& h) {
  if (h.counts.empty()) return nullptr;
  return {{"width", h.width}, {"first", h.first}, {"counts", h.counts}, {"mean", h.mean}};
}

quant::Histogram histogram_from_json(const json& j) {
  if (j.is_null()) return {};
  const json& counts = j.at("counts");
  const auto count = [](const json& n) { return n.is_number_integer() && n.get<int64_t>() >= 0; };
  const double width = j.at("width").get<double>(), first = j.at("first").get<double>();
  check(counts.is_array() && !counts.empty() && std::all_of(counts.begin(), counts.end(), count) &&
            width > 1e-9 && width < 1e9 && std::abs(first) < (1 << 30),
        "report of a block: a histogram of width {} from {} on: counts, or numbers out of range",
        width, first);
  return {.width = width,
          .first = static_cast<int64_t>(first),
          .counts = counts.get<std::vector<int64_t>>(),
          .mean = j.at("mean").get<double>()};
}

template <class T> T whole(const json& j) {
  check(j.is_number_integer(), "report of a block: {} is not a whole number", j.dump());
  return j.get<T>();
}

void read_linears(const json& j, quant::BlockReport& b) {
  b.output_errors = j.at("linear_errors").get<std::string>() == "outputs";
  for (const json& l : j.at("linears"))
    b.linears.push_back({.name = l.at("name").get<std::string>(),
                         .error_nearest = l.at("error_nearest").get<double>(),
                         .error = l.at("error").get<double>(),
                         .gamma = histogram_from_json(l.at("gamma")),
                         .beta = histogram_from_json(l.at("beta"))});
  for (const json& s : j.at("sites"))
    b.sites.push_back({.name = s.at("name").get<std::string>(),
                       .log2_scale = histogram_from_json(s.at("log2_scale")),
                       .shift = histogram_from_json(s.at("shift"))});
}

bool on_one_line(const json& j) {
  return j.is_array() &&
         std::all_of(j.begin(), j.end(), [](const json& v) { return v.is_primitive(); });
}

void write(const json& j, const std::string& indent, std::string& out) {
  if (!j.is_structured() || j.empty() || on_one_line(j)) {
    out += json_text(j);
    return;
  }
  const std::string inner = indent + "  ";
  out += j.is_object() ? "{" : "[";
  bool first = true;
  for (const auto& [key, value] : j.items()) {
    out += (first ? "\n" : ",\n") + inner;
    if (j.is_object()) out += json_text(key) + ": ";
    write(value, inner, out);
    first = false;
  }
  out += "\n" + indent + (j.is_object() ? "}" : "]");
}

}  // namespace

std::string readable(const json& j) {
  std::string out;
  write(j, "", out);
  return out + "\n";
}

json block_json(const quant::BlockReport& b) {
  json j = {{"block", b.name},
            {"epoch_loss", b.epoch_loss},
            {"committed_loss", b.committed_loss},
            {"target_mean_square", b.target_mean_square},
            {"packed_error", b.packed_error},
            {"seconds", b.seconds},
            {"peak_tensor_bytes", b.peak_bytes},
            {"linear_errors", b.output_errors ? "outputs" : "weights"},
            {"linears", json::array()},
            {"sites", json::array()}};
  for (const quant::LinearReport& l : b.linears)
    j["linears"].push_back({{"name", l.name},
                            {"error_nearest", l.error_nearest},
                            {"error", l.error},
                            {"gamma", histogram_json(l.gamma)},
                            {"beta", histogram_json(l.beta)}});
  for (const quant::SiteReport& s : b.sites)
    j["sites"].push_back({{"name", s.name},
                          {"log2_scale", histogram_json(s.log2_scale)},
                          {"shift", histogram_json(s.shift)}});
  if (b.kept_epoch > 0) j["kept_epoch"] = b.kept_epoch;
  if (b.recoveries.empty()) return j;
  for (const quant::Recovery& r : b.recoveries)
    j["recoveries"].push_back(
        {{"epoch", r.epoch}, {"rate_factor", r.rate_factor}, {"tensor", r.tensor}});
  return j;
}

quant::BlockReport block_from_json(const json& j) {
  try {
    quant::BlockReport b;
    b.name = j.at("block").get<std::string>();
    b.epoch_loss = j.at("epoch_loss").get<std::vector<double>>();
    b.committed_loss = j.at("committed_loss").get<double>();
    b.target_mean_square = j.at("target_mean_square").get<double>();
    b.packed_error = j.at("packed_error").get<double>();
    b.seconds = j.at("seconds").get<double>();
    b.peak_bytes = whole<size_t>(j.at("peak_tensor_bytes"));
    if (j.contains("kept_epoch")) b.kept_epoch = whole<int>(j["kept_epoch"]);
    if (j.contains("recoveries"))
      for (const json& r : j["recoveries"])
        b.recoveries.push_back({whole<int>(r.at("epoch")), r.at("rate_factor").get<double>(),
                                r.at("tensor").get<std::string>()});
    if (j.contains("linears")) read_linears(j, b);
    return b;
  } catch (const json::exception& e) {
    fail("report of a block: {}", e.what());
  }
}

}  // namespace omq
