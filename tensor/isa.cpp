// Which instruction set the packed kernels use. See isa.h; their loops: cpu/packed_isa.h.
#include "tensor/isa.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "tensor/cpu/packed_isa.h"
#include "tensor/error.h"

namespace omq {
namespace {

using cpu::PackedIsa;

std::atomic<const PackedIsa*> active_isa{nullptr};

const PackedIsa* find_isa(std::string_view name) {
  for (auto p = cpu::kPackedIsas; *p != nullptr; ++p)
    if ((*p)->name == name && (*p)->runs_here()) return *p;
  return nullptr;
}

const PackedIsa& choose_isa() {
  const char* wanted = std::getenv("OMQ_ISA");
  const std::vector<const char*> here = packed_isas_here();
  const PackedIsa* isa = find_isa(wanted && *wanted ? wanted : here.front());
  if (isa == nullptr) {
    std::string names;
    for (const char* name : here) names += std::string(names.empty() ? "" : ", ") + name;
    fail("OMQ_ISA={} does not run on this machine; it runs {}", wanted, names);
  }
  active_isa.store(isa);
  return *isa;
}

}  // namespace

const PackedIsa& cpu::active_packed_isa() {
  const PackedIsa* chosen = active_isa.load(std::memory_order_relaxed);
  return chosen ? *chosen : choose_isa();
}

const char* packed_isa_name() { return cpu::active_packed_isa().name; }

bool force_packed_isa(std::string_view name) {
  const PackedIsa* found = find_isa(name);
  if (found) active_isa.store(found);
  return found != nullptr;
}

std::vector<const char*> packed_isas_here() {
  std::vector<const char*> names;
  for (auto p = cpu::kPackedIsas; *p != nullptr; ++p)
    if ((*p)->runs_here()) names.push_back((*p)->name);
  return names;
}

}  // namespace omq
