// How omq-run settles what kind of cache a model gets, on a CPU and on a GPU.
#include "tools/run_common.h"

#include <doctest/doctest.h>

#include "models/packed_model.h"
#include "tools/cli.h"

namespace omq::run {
namespace {

constexpr Device kCpu{}, kGpu{DeviceType::CUDA, 0};

// A model whose attention keeps keys and values of so many bits; 16: as they are.
ModelConfig model(int k_bits = 16, int v_bits = 16) {
  ModelConfig c;
  if (k_bits == 16 && v_bits == 16) return c;
  const ActivationSpec a{.activation = 8, .q = 8, .k = k_bits, .v = v_bits};
  c.quantization =
      PackedConfig{.method = "omniquant", .weight = {.bits = 4}, .exceptions = {}, .activations = a}
          .to_json();
  return c;
}

// "u8 f16": the types of keys and values; or the message.
std::string kept(const ModelConfig& c, Device device, const char* k, const char* v) {
  ModelOptions o;
  o.cache_k = k, o.cache_v = v;
  try {
    const nn::CacheQuant q = kept_caches(c, o, device);
    return cache_type(q.k, q.floats) + " " + cache_type(q.v, q.floats);
  } catch (const cli::UsageError& e) {
    return e.what();
  }
}

TEST_CASE("omq-run: caches on a CPU are the model's own, else what is named") {
  CHECK(kept(model(), kCpu, "", "") == "f32 f32");
  CHECK(kept(model(), kCpu, "f16", "") == "f16 f16");
  CHECK(kept(model(), kCpu, "int8", "") == "u8 f32");
  CHECK(kept(model(), kCpu, "int8", "q4_0") == "u8 u4");
  CHECK(kept(model(4, 8), kCpu, "", "") == "u4 u8");
  CHECK(kept(model(4, 8), kCpu, "int4", "int8") == "u4 u8");
  CHECK(kept(model(4, 8), kCpu, "int8", "") ==
        "--cache-type-k int8: this model keeps codes of 4 bits there, as its attention reads them");
}

TEST_CASE("omq-run: caches on a GPU are alike, in F16 unless codes are named") {
  CHECK(kept(model(), kGpu, "", "") == "f16 f16");
  CHECK(kept(model(8, 8), kGpu, "", "") == "f16 f16");
  CHECK(kept(model(8, 8), kGpu, "f16", "") == "f16 f16");
  CHECK(kept(model(), kGpu, "int8", "") == "u8 u8");
  CHECK(kept(model(), kGpu, "", "int4") == "u4 u4");
  CHECK(kept(model(8, 8), kGpu, "int8", "int8") == "u8 u8");
  CHECK(kept(model(), kGpu, "f32", "") ==
        "cache type f32: a GPU keeps f16, int8 or int4; --device cpu has it");
  const std::string alike = "a GPU keeps keys and values alike, both f16, both int8 or both int4";
  CHECK(kept(model(), kGpu, "int8", "f16") == "-ctk int8 -ctv f16: " + alike);
  CHECK(kept(model(), kGpu, "int8", "int4") == "-ctk int8 -ctv int4: " + alike);
  CHECK(kept(model(4, 8), kGpu, "int4", "") ==
        "--cache-type-v int4: this model keeps codes of 8 bits there, as its attention reads them");
}

}  // namespace
}  // namespace omq::run
