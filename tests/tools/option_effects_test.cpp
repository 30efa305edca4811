// Options that would change nothing are refused by name; those that change something are not, in
// whichever run they do.
#include <doctest/doctest.h>

#include <string>
#include <utility>

#include "tests/support/shared.h"
#include "tests/tools/workshop.h"

namespace omq {

TEST_CASE("omq-quant: options without an effect are code 2, with the reason") {
  const Workshop w;
  const std::pair<const char*, const char*> cases[] = {
      // Nothing learns.
      {"--method rtn --epochs 2",
       "--epochs: method rtn learns nothing; leave it out, or add --train"},
      {"--method gptq --epochs 2", "--epochs: method gptq learns nothing"},
      {"--method rtn --wd 0.1", "--wd: method rtn learns nothing"},
      {"--method gptq --batch-size 2", "--batch-size: method gptq learns nothing"},
      {"--method rtn --lwc-lr 0.1", "--lwc-lr: method rtn learns nothing"},
      {"--method quarot --lwc-lr 0.1", "--lwc-lr: method quarot learns nothing"},
      {"--method rtn --let-lr 0.1", "--let-lr: method rtn learns nothing"},
      {"--method gptq --rate lwc=0.1", "--rate lwc=0.1: method gptq learns nothing"},
      {"--method rtn --schedule linear", "--schedule: method rtn learns nothing"},
      {"--epochs 0 --lwc-lr 0.1", "--lwc-lr: nothing is learned at --epochs 0"},
      {"--epochs 0 --rate lwc=0.1", "--rate lwc=0.1: nothing is learned at --epochs 0"},
      {"--method best --preset w8a8 --wd 1",
       "--wd: method best (here quarot --round gptq) learns nothing"},
      // There is no error of a block.
      {"--method gptq --aug-loss", "--aug-loss: method gptq learns from no block's error here"},
      {"--method quarot --no-aug-loss",
       "--no-aug-loss: method quarot learns from no block's error"},
      {"--method rtn --no-token-loss", "--no-token-loss: method rtn learns from no block's error"},
      {"--method norm-tweaking --aug-loss", "--aug-loss: method norm-tweaking learns from no"},
      {"--epochs 0 --token-loss", "--token-loss: method omniquant learns from no block's error"},
      // Something else learns.
      {"--method efficientqat --lwc-lr 0.1",
       "--lwc-lr: method efficientqat learns no clipping factors; --rate GROUP=X sets those of "
       "grid, norms, weights"},
      {"--method norm-tweaking --lwc-lr 0.1", "--rate GROUP=X sets those of norms"},
      {"--method signround --lwc-lr 0.1", "--rate GROUP=X sets those of range, rounding"},
      {"--method best --wbits 2 --lwc-lr 1", "--lwc-lr: method best (here efficientqat) learns no"},
      {"--clip minmax --transform let --lwc-lr 1", "--lwc-lr: method omniquant --transform let"},
      {"--rate grid=0.1", "--rate grid=0.1: method omniquant has none that learn; --rate"},
      {"--method efficientqat --rate grid=0.1 lwc=1", "--rate lwc=1: method efficientqat has none"},
      {"--method flatquant --let-lr 0.1",
       "--let-lr: method flatquant learns transforms of another"},
      // There is no transformation.
      {"--let-lr 0.1", "--let-lr: there is no transformation to act on; add --let"},
      {"--alpha 0.4", "--alpha: there is no transformation to act on; add --let"},
      {"--method rtn --alpha 0.4",
       "--alpha: there is no transformation to act on; add --transform"},
      {"--preset w4a4 --no-let --alpha 0.4", "--alpha: there is no transformation to act on"},
      {"--no-let-shift", "--no-let-shift: there is no transformation to act on; add --let"},
      {"--method flatquant --no-let-shift", "--no-let-shift: method flatquant has no shifts"},
      {"--method norm-tweaking --transform let --let-lr 1", "learns nothing of the transformation"},
      {"--method signround --clip-search",
       "--clip-search: method signround has no clipping factors"},
      // There is no text, or nothing is read of one.
      {"--method rtn --nsamples 4", "--nsamples: there is no text to take windows of; add --calib"},
      {"--method rtn --seqlen 64", "--seqlen: there is no text to take windows of; add --calib"},
      {"--method rtn --seed 4", "--seed: there is no text to take windows of; add --calib"},
      {"--calib-ids x --seed 4", "--seed: --calib-ids has its windows as they are"},
      {"--calib-ids x --seqlen 64", "--seqlen: --calib-ids has its windows as they are"},
      {"--eval-context 64", "--eval-context: nothing is evaluated; add --eval ppl:FILE"},
      {"--eval_chunks 2", "--eval-chunks: nothing is evaluated; add --eval ppl:FILE"},
  };
  for (const auto& [arguments, message] : cases)
    w.check_refused(fmt::format("-m x -o y {}", arguments), 2, message);
}

TEST_CASE("omq-quant: options with an effect are taken") {
  const Workshop w;
  for (const std::string arguments :
       {"--method signround --wd 0.1", "--method efficientqat --wd 0.1 --batch-size 2 --aug-loss",
        "--method norm-tweaking --batch-size 2 --wd 0.1 --rate norms=0.01",
        "--method efficientqat --clip lwc --lwc-lr 0.1 --clip-search",
        "--method efficientqat --abits 4 --learn-act-clip --lwc-lr 0.1 --rate lac=0.1",
        "--method signround --let --let-lr 0.1 --alpha 0.4 --no-let-shift",
        "--method signround --rate rounding=2 range=0.5 --no-token-loss",
        "--method rtn --clip lwc --train clip --epochs 2 --lwc-lr 0.1 --clip-search",
        "--method rtn --transform let --alpha 0.4 --no-let-shift",
        "--method flatquant --abits 4 --alpha 0.4 --lwc-lr 0.1 --rate kronecker=0.1 lac=0.1",
        "--preset w4a4 --let-lr 0.1 --alpha 0.4 --no-let-shift --no-aug-loss",
        "--epochs 0 --clip-search", "--method rtn --calib q --nsamples 2 --seqlen 8 --seed 4",
        "--calib-ids q --nsamples 2", "--parity", "--preset w4a4 --parity",
        "--method gptq --parity", "--method rtn --no-let",
        "--eval ppl:q --eval-context 64 --eval-chunks 2"}) {
    CAPTURE(arguments);
    w.check_refused(fmt::format("-m x -o y {}", arguments), 1, "x: no such file or folder");
  }
}

TEST_CASE("omq-quant audit: options of a learning run are refused, those of the setting taken") {
  const Workshop w;
  const std::pair<const char*, const char*> refused[] = {
      {"--rate lwc=1", "--rate: an audit takes no learning step; leave it out"},
      {"--schedule linear", "--schedule: an audit takes no learning step"},
      {"--keep-epoch best", "--keep-epoch: an audit takes no learning step"},
      {"--train-inputs full", "--train-inputs: an audit takes no learning step"},
      {"--let-lr 0.1", "--let-lr: an audit takes no learning step"},
      {"--alpha 0.4", "--alpha: an audit gives the transformation random scales"},
      {"--preset w4a4 --signed-max", "--signed-max: an audit gives the transformation random"},
      {"--preset w4a4 --one-consumer", "--one-consumer: an audit gives the transformation random"},
  };
  for (const auto& [options, message] : refused)
    w.check_refused(fmt::format("audit -m x {}", options), 2, message);
  for (const std::string option :
       {"--no-let-shift", "--no-let", "--preset w4a4 --untied-qk --act-clip 0.9", "--seed 3",
        "--method gptq --damping 0.1", "--method quarot --rotation-seed 4", "--parity"})
    w.check_refused("audit -m x " + option, 1, "x: no such file or folder");
}

}  // namespace omq
