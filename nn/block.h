// Block: one decoder layer as a value, and all that quant/ may know of a model.
//
// A block holds tensors; copying it (clone) shares every Storage, so a transform is an edit of a
// cheap copy and the full-precision block stays as it was. Its Sites say where a
// function-preserving rescaling may go (paper Eq. 3, 5).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "nn/attention.h"
#include "nn/linear.h"
#include "nn/norm.h"

namespace omq::nn {

struct HeadLayout {
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
};
struct NormToLinears {  // norm → q,k,v and norm → gate,up
  RMSNorm* norm;
  std::vector<Linear*> consumers;
  Linear* lead;  // the consumer that the official code takes for all: q, up
};
struct LinearToLinear {  // v → o
  Linear *producer, *consumer;
  HeadLayout heads;
};
struct QueryKey {  // rows of q against rows of k
  Linear *q, *k;
  HeadLayout heads;
};
struct UpToDown {  // rows of up against columns of down, through the product with the gate
  Linear *up, *down;
};
using Site = std::variant<NormToLinears, LinearToLinear, QueryKey, UpToDown>;

struct NamedLinear {
  std::string name;  // within the block: "self_attn.q_proj"
  Linear* linear;
};

struct Block {
  virtual ~Block() = default;
  // [B,T,D] → [B,T,D]; with a cache, earlier tokens are seen and these are added.
  virtual Tensor forward(const Tensor& x, const Positions& at, KVCache* cache = nullptr) const = 0;
  virtual std::unique_ptr<Block> clone() const = 0;  // shares every Storage
  virtual void visit(const VisitFn& v) = 0;          // names within the block, as in the checkpoint
  virtual std::vector<NamedLinear>
  linears() = 0;  // the matrices that are quantised, in the order of the forward
  virtual std::vector<Site> sites() = 0;
  virtual Attention::Taps& taps() = 0;  // where q, k, v and the probabilities can be quantised
};

// Every tensor t of the block, those that are undefined left out, becomes change(t). One that
// stands at several places, as the factors that matrices behind a norm share, stays one.
void change_tensors(Block& block, const std::function<Tensor(const Tensor&)>& change);
// Every tensor of the block onto a device; those that are there already are shared.
void move_to(Block& block, Device device);

// Matrices of F32 whose every value BF16 or F16 holds exactly become that: what a checkpoint stored
// in 16 bits. Waits for the device.
void narrow_exact(Block& block);

// What is quantised on its way through a block, each row on its own grid; none: nothing.
struct ActivationQuant {
  std::optional<RowQuant> linear;      // inputs of the linears, a row being a token
  std::optional<RowQuant> q, k, v, p;  // Attention::Taps
};
// From now on `b` quantises so.
void quantize_activations(Block& b, const ActivationQuant& s);

// A model as a row of blocks, loaded one at a time.
struct BlockSource {
  virtual ~BlockSource() = default;
  virtual int size() const = 0;
  virtual std::unique_ptr<Block> load(int i) = 0;
  virtual std::string name(int i) const = 0;    // "model.layers.7"
  virtual Tensor embed(const Tensor& ids) = 0;  // I32 [B,T] → F32 [B,T,D]: the input of block 0
  virtual RopeTables rope(int64_t positions) = 0;  // tables for that many positions
};

// Where finished blocks go.
struct BlockSink {
  virtual ~BlockSink() = default;
  virtual void store(int i, Block& packed) = 0;
};

}  // namespace omq::nn
