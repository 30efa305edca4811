// The fused stages of a decode step on a device that records its work: what models/decode_plan.h
// runs there, each stage one kernel. On the CPU its twins are RowProducts (tensor/row_products.h)
// and DecodeAttention; in both the blocks are the definition.
//
// A step reads nothing from the host: ids, position and cache stand in device memory, so one
// recording is replayed for every token. Stages are chained: each may start while the one before it
// runs, and reads weights until that has ended.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "tensor/row_products.h"

namespace omq {

// What a stage multiplies: rows of x, behind an RMSNorm where gain is defined, rounded to a grid of
// their own where `quant` says so.
struct DecodeInput {
  Tensor x;                      // F32 [rows, K]; weights are read anew for every few rows
  Tensor gain = {}, shift = {};  // F32 [K] or undefined
  double eps = 0;
  std::optional<RowQuant> quant = {};
  // U8 or undefined: x times the gain, and its squares, as the stage in front has left them
  // (DecodeNext). x is given all the same.
  Tensor prepared = {};
};
// What a stage knows of the next one.
struct DecodeNext {
  // Where the one row of results is left, times gain, as the next stage's products take it:
  // computed once, where every block of the next stage would have to. U8
  // [DecodeKernels::prepared_bytes], filled with zeros when made; undefined: nowhere.
  Tensor row = {};
  Tensor gain = {};  // F32 or undefined: of the next stage's RMSNorm
  // What it multiplies. Where it is packed, as this stage is, and the step is recorded, some of it
  // is asked for early, as memory is idle between two stages.
  std::span<const RowMatrix> weights = {};
};
// The products of a stage.
struct RowStage {
  std::span<const RowMatrix> matrices = {};
  RowOutput output = RowOutput::Store;
};
// Neighbouring elements of a head that a lane of attention takes; heads are multiples of it, up to
// 256.
inline constexpr int64_t decode_elements(int64_t head_dim) {
  return head_dim <= 64 ? 2 : head_dim <= 128 ? 4 : 8;
}

// Keys or values of all sequences, as they are stored: F16 [rows, capacity, K, d], or, where that
// is undefined, codes of that shape (of half the last size, where two share a byte).
struct DecodeCache {
  Tensor floats = {};
  QuantizedRows codes = {};
};

// One token of every sequence against its cache. H query heads share K key and value heads.
struct DecodeAttentionStage {
  Tensor qkv;                       // F32 [rows, (H + 2K)·d]: q, then k, then v
  Tensor q_gain = {}, k_gain = {};  // F32 [d], norms on each head of q and k; or undefined
  double q_eps = 0, k_eps = 0;
  Tensor cos, sin;  // F32 [positions, d/2]
  Tensor position;  // I32 [rows]: where a token stands, and how many are cached
  // Each head on its own grid, behind the rotation; where the cache keeps codes, k and v on theirs.
  std::optional<RowQuant> q, k, v;
  DecodeCache keys, values;  // stored alike; a row's `position` is written
  Tensor parts;              // F32 [rows, H, splits, d + 2], scratch
  Tensor arrived;            // I32 [rows, H], zeros before and after
  Tensor y;                  // F32 [rows, H·d]
  Tensor prepared = {};      // where y is left for the next stage, as in DecodeNext; heads of 32·n
  Tensor next = {};  // weights that the stage behind reads: asked for early, as memory is idle
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
};
// How many parts a cache of `capacity` tokens is read in.
inline constexpr int64_t kDecodeSplitTokens = 32;  // at least so many in each
inline constexpr int64_t kDecodeMostSplits = 8;    // a cluster of every device that has them

// How the next token is chosen from its logits, as models/sampler.h defines it: bias, top-k, top-p,
// min-p, temperature, draw.
struct TokenChoice {
  int64_t top_k = 1;  // 1 … kDecodeMostTopK; 1: the largest, the lowest id among equals
  double top_p = 1, min_p = 0, temperature = 1;
  Tensor numbers = {};  // F64 [rows, positions], in [0, 1): what the token behind a position is
                        // drawn by; undefined where the largest is taken without bias
  Tensor bias_ids = {}, bias = {};  // I32, F32 [n], or undefined: added to the logits of these ids,
                                    // no id twice; −∞ forbids it
  bool takes_largest() const { return top_k == 1 && !bias.defined(); }
};
inline constexpr int64_t kDecodeMostTopK = 128;
// Told instead of an id: a logit is NaN; every token is forbidden.
inline constexpr int32_t kChosenNaN = -1, kChosenNothing = -2;

struct DecodeKernels {
  // y: F32; Store: [rows, Σ N]; Add, SiluMul: [rows, N]. Matrices of one form share a launch.
  void (*products)(Tensor& y, const DecodeInput& x, std::span<const RowMatrix> matrices,
                   RowOutput output, const DecodeNext& next);
  void (*attention)(const DecodeAttentionStage& s);
  // For each row of logits [rows, V], to which the bias is added in place, the id of a token: state
  // (I32 [2, rows]: tokens, positions) becomes it and the next position; word (position % 2, row)
  // of told (U8 [16 · rows], page-locked, 64-bit words [2, rows]) becomes position · 2³² + id.
  void (*choose)(Tensor& state, Tensor& told, Tensor& logits, const TokenChoice& by);
  // Why no kernel takes such matrices together; null when one does.
  const char* (*unsupported)(std::span<const RowMatrix> matrices, RowOutput output);
  // Bytes of a row that products `from` (none: attention) leave for products `to`, where x is of
  // one row and neither shifted nor quantised; 0: they cannot.
  int64_t (*prepared_bytes)(const RowStage& from, const RowStage& to);
};

// Of x's device; null where there are none (the CPU, a build without CUDA).
const DecodeKernels* decode_kernels(Device d);
const DecodeKernels* cuda_decode_kernels();  // defined in cuda/: null in a build without CUDA

}  // namespace omq
