// Calibration: the paper's algorithm, block by block, over any BlockSource (Eq. 1).
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "nn/block.h"
#include "quant/hessian.h"
#include "quant/hooks.h"
#include "quant/recipe.h"
#include "quant/report.h"

namespace omq::quant {

// The recipe's pieces made for one block.
class BlockMethod {
 public:
  // stats: of the activations at fp's sites, for recipes with a transform.
  BlockMethod(const Recipe& recipe, nn::Block& fp, const BlockStats& stats = {});

  // A copy of fp whose matrices went through transform, clip and fake quantisation, and whose
  // activations go through theirs; differentiable in the learnables. Where norms learn after
  // rounding and that is done, its matrices are the rounded ones.
  std::unique_ptr<nn::Block> quantized(const nn::Block& fp) const;
  // fp behind the transforms: the same function but for its quantised activations.
  std::unique_ptr<nn::Block> transformed(const nn::Block& fp) const;
  // Starts the clips that look at what their matrices are multiplied with (Clip::start), on x
  // [1,T,D]: tokens that go into the block, which is where fp is.
  bool starts_from_inputs() const;
  void start(const nn::Block& fp, const Tensor& x, const nn::Positions& at) const;
  std::vector<nn::ParamGroup> param_groups() const;
  // Every parameter of those groups under a name of its own.
  std::vector<Learnable> learnables() const;

  struct Committed {
    std::unique_ptr<nn::Block> simulated;  // dense, dequantised: what the packed block computes
    std::unique_ptr<nn::Block> packed;     // codes
  };
  // Fixes the learnables: scales are rounded to f16 first, then codes are chosen on that grid, so
  // that the packed block equals the simulated one bit for bit. data: for rounders that look at the
  // inputs of a matrix; these are the inputs that it has behind the rounded ones before it. All in
  // host memory but the data.
  Committed commit(const nn::Block& fp, const CommitData* data = nullptr) const;
  // Chooses the codes for good: from now on only norms change.
  void fix_rounding(const nn::Block& fp, const CommitData* data);
  // Takes the matrices that another one has fixed, onto a device.
  void take_rounding(const BlockMethod& from, Device device);

 private:
  // The block that is put on grids: with the weights and norms as they are now, and transformed.
  std::unique_ptr<nn::Block> student(const nn::Block& fp) const;
  // The matrix that is rounded on g: w, or with the offsets of learned rounding.
  Tensor with_offsets(size_t linear, const Tensor& w, const Grid& g) const;
  void apply_gains(nn::Block& b) const;
  void start_act_clips(nn::Block& fp);
  // The shares as they are now: tensors that learn, or numbers for good.
  void apply_act_clips(nn::Block& b) const;
  void fix_act_clips(nn::Block& b) const;
  std::shared_ptr<nn::PackedWeight> rounded(size_t linear, const Tensor& w,
                                            const Tensor& hessian) const;
  Committed round(const nn::Block& fp, const CommitData* data) const;
  // Calls see(owner, group) for all that the plan lets learn.
  void each_group(const std::function<void(const std::string&, nn::ParamGroup)>& see) const;

  const Recipe& recipe_;
  std::vector<std::unique_ptr<Transform>> transforms_;
  std::vector<std::unique_ptr<Clip>> clips_;  // in the order of Block::linears()
  std::vector<std::string> linears_;          // their names
  std::vector<Tensor> weights_;               // that learn, [out, in] of each linear; or empty
  std::vector<Tensor> act_logits_;            // σ of them: RowQuant::clip, [1] of each linear
                                              // (readers of one norm share it); or empty
  std::vector<Tensor> offsets_;               // of learned rounding, in steps; the same
  struct Gain {
    size_t site;  // in Block::sites()
    std::string norm;
    Tensor factor;  // [D]
  };
  std::vector<Gain> gains_;
  std::optional<Committed> rounded_;  // once the rounding is fixed, without gains
};

// The inputs of a block's linears, in their order, for some tokens x [1,T,D], as they are before
// anything is quantised.
std::vector<Tensor> linear_inputs(const nn::Block& block, const Tensor& x, const nn::Positions& at);

// How far the packed kernels are from the simulated matrices, as a share of their outputs, on the
// inputs that each linear has in the simulated block (their first tokens: packed weights are
// multiplied on the CPU); where these are quantised, it is the product in integers against the
// simulated one. Linear by linear, since a code of an activation that falls to the other side of a
// tie is no fault. Rounding alone gives about 1e-6. Throws Error naming the linear beyond
// kPackedError: a fault, which must not reach a file.
inline constexpr double kPackedError = 1e-3;
double packed_error(const BlockMethod::Committed& block, const std::vector<Tensor>& inputs);

// One matrix by round-to-nearest: codes, then packed. For tables outside the blocks.
std::shared_ptr<nn::PackedWeight> pack_nearest(const Tensor& w, const QuantSpec& spec);

// Called after every epoch (epoch counts from 1) and, with epoch = -1, when the block is done.
using Progress = std::function<void(const BlockReport& block, int epoch, int epochs)>;

struct CalibrationData {
  Tensor ids;  // I32 [samples, tokens]; undefined: no streams, for recipes that learn nothing
  Device device = {};  // where blocks compute and learn; codes are chosen and packed on the CPU
  bool samples_on_host = false;  // the streams stay in host memory, whatever the device
};

// Quantises every block of the source into the sink, keeping the two streams of §8 (full precision
// and quantised). `simulated` (optional) receives the dense twins. Throws Error naming block, epoch
// and tensor when a loss stays not finite at lower rates (recovery.h). With hooks.store finished
// blocks of an earlier run are taken over; the result has the same bytes as an unbroken run.
std::vector<BlockReport> quantize(nn::BlockSource& source, nn::BlockSink& sink,
                                  const Recipe& recipe, const CalibrationData& data,
                                  const Progress& progress = {}, nn::BlockSink* simulated = nullptr,
                                  const Hooks& hooks = {});

}  // namespace omq::quant
