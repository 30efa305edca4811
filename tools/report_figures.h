// The figures of a report's page, drawn from the reports of its blocks.
#pragma once

#include <string>
#include <vector>

#include "quant/report.h"

namespace omq {

struct Figure {
  std::string svg;      // empty: there is nothing to draw
  std::string caption;  // HTML; without a picture the sentence that says why, or nothing
};

using BlockReports = std::vector<quant::BlockReport>;

Figure loss_by_depth(const BlockReports& blocks);
Figure loss_by_epoch(const BlockReports& blocks);
Figure linear_errors(const BlockReports& blocks);
Figure clip_factors(const BlockReports& blocks);          // report_distributions.cpp
Figure transformation_sites(const BlockReports& blocks);  // likewise
Figure cost_by_depth(const BlockReports& blocks);

// Names of the linears, in the order of the first block that has each: "self_attn.q_proj".
std::vector<std::string> linear_kinds(const BlockReports& blocks);
// Of block b; nothing when it has none of that name.
const quant::LinearReport* find_linear(const quant::BlockReport& b, const std::string& name);
// Whether any matrix differs from rounding to nearest.
bool beyond_nearest(const BlockReports& blocks);
// "q_proj" of "self_attn.q_proj".
std::string short_name(const std::string& name);

}  // namespace omq
