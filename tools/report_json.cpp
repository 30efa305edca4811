// See report_json.h.
#include "tools/report_json.h"

#include "tensor/error.h"

namespace omq {

using nlohmann::json;

json block_json(const quant::BlockReport& b) {
  json j = {{"block", b.name},
            {"epoch_loss", b.epoch_loss},
            {"committed_loss", b.committed_loss},
            {"target_mean_square", b.target_mean_square},
            {"packed_error", b.packed_error},
            {"seconds", b.seconds},
            {"peak_tensor_bytes", b.peak_bytes}};
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
    b.peak_bytes = j.at("peak_tensor_bytes").get<size_t>();
    if (j.contains("recoveries"))
      for (const json& r : j["recoveries"])
        b.recoveries.push_back({r.at("epoch").get<int>(), r.at("rate_factor").get<double>(),
                                r.at("tensor").get<std::string>()});
    return b;
  } catch (const json::exception& e) {
    fail("report of a block: {}", e.what());
  }
}

}  // namespace omq
