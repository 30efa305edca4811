// Activations, the equivalent transformation and parity switches (spec omniquant §17).
#include "tools/transform_options.h"

#include <CLI/CLI.hpp>

namespace omq {
namespace {

using cli::UsageError;

// 1, 0 or −1 for neither.
int yes_or_no(bool yes, bool no, const char* name) {
  if (yes && no) throw UsageError(fmt::format("--{} and --no-{} exclude each other", name, name));
  return yes ? 1 : no ? 0 : -1;
}

}  // namespace

void add_transform_options(CLI::App& app, TransformFlags& f) {
  const char* group = "Activations and the equivalent transformation (LET)";
  const auto option = [&](const char* name, auto& value, const char* type, const char* help) {
    app.add_option(name, value, help)->type_name(type)->group(group);
  };
  const auto bits = [&](const char* name, std::optional<int>& value, const char* help) {
    option(name, value, "N", help);
  };
  bits("--abits", f.abits,
       "bits of the inputs of matrices, and of q, k, v: 2 to 8; 16 (default): "
       "as they are");
  bits("--q-bits", f.q_bits, "bits of queries, a grid for each token and head (default --abits)");
  bits("--k-bits", f.k_bits, "bits of keys, and of the key cache (default --abits)");
  bits("--v-bits", f.v_bits, "bits of values, and of the value cache (default --abits)");
  bits("--p-bits", f.p_bits, "bits of attention probabilities (default 16: as they are)");
  option("--act-clip", f.act_clip, "X",
         "share of its range that a token's codes span at the input of matrices, above 0 to 1 "
         "(default 1; quarot and flatquant 0.9)");
  app.add_flag("--learn-act-clip", f.learn_act_clip,
               "learn that share, one for each input of matrices; --act-clip is where it starts "
               "(1: at 0.98; default with flatquant)")
      ->group(group);
  app.add_flag("--no-learn-act-clip", f.no_learn_act_clip, "leave it as it is")->group(group);
  option("--qkv-clip", f.qkv_clip, "X",
         "the same of q, k and v (default 1; quarot and flatquant 0.95)");
  app.add_flag("--let", f.let, "learn the transformation (default when activations are quantised)")
      ->group(group);
  app.add_flag("--no-let", f.no_let, "do not")->group(group);
  app.add_option(
         "--let-lr", f.let_lr,
         "learning rate of its scales and shifts (default 0.005, at w4a4 0.001; signround 0.1)")
      ->type_name("X")
      ->group(group);
  app.add_option("--alpha", f.alpha,
                 "its start: activations^alpha / weights^(1-alpha) (default 0.5)")
      ->type_name("X")
      ->group(group);
  app.add_flag("--let-shift", f.shift,
               "learn shifts too; they become biases (default at activations of 5 to 8 bits)")
      ->group(group);
  app.add_flag("--no-let-shift", f.no_shift, "scales alone, as the official code")->group(group);
  app.add_flag("--let-up-down", f.up_down, "transform between up_proj and down_proj too")
      ->group(group);
  app.add_option("--rotate", f.rotate,
                 "what quarot rotates before matrices that read a norm: \"residual\", the stream, "
                 "at no cost (default), or \"norms\", what each norm gives, online")
      ->type_name("WHERE")
      ->group(group);
  app.add_option("--rotation-seed", f.rotation_seed,
                 "of the random parts of a rotation (quarot; default 0)")
      ->type_name("N")
      ->group(group);

  const char* parity = "Choices of the official code, for comparisons";
  app.add_flag("--parity", f.parity,
               "all of its present ones: --no-let-shift, --no-token-loss and the five below but "
               "--signed-max; its scripts add --aug-loss at 2 bits and at w4a4")
      ->group(parity);
  app.add_flag("--untied-qk", f.untied,
               "a q-k scale for each channel; inexact under rotary positions")
      ->group(parity);
  app.add_flag("--official-range", f.range,
               "ranges need not hold 0; zero points that leave the codes cannot be stored")
      ->group(parity);
  app.add_flag("--official-symmetric", f.symmetric,
               "--symmetric around 2^(b-1) - 1, with one code unused")
      ->group(parity);
  app.add_flag("--one-consumer", f.one_consumer,
               "scales start from the weights of q_proj and up_proj alone")
      ->group(parity);
  app.add_flag("--signed-max", f.signed_max,
               "scales start from the largest weight, not the largest magnitude (first releases)")
      ->group(parity);
}

void settle_transform(const TransformFlags& f, quant::Options& o) {
  if (f.abits) o.spec.abits = *f.abits;
  if (f.q_bits) o.spec.q_bits = *f.q_bits;
  if (f.k_bits) o.spec.k_bits = *f.k_bits;
  if (f.v_bits) o.spec.v_bits = *f.v_bits;
  if (f.p_bits) o.spec.p_bits = *f.p_bits;
  o.spec.official_range = f.range || f.parity;
  o.spec.official_symmetric = f.symmetric || f.parity;
  if (f.symmetric && !o.spec.symmetric)
    throw UsageError("--official-symmetric: it is a kind of --symmetric, which is missing");
  for (const auto& [name, value] :
       {std::pair{"--act-clip", f.act_clip}, {"--qkv-clip", f.qkv_clip}})
    if (value && !(*value > 0 && *value <= 1))
      throw UsageError(fmt::format("{}: above 0 and at most 1", name));
  o.act_clip = f.act_clip.value_or(-1);
  o.qkv_clip = f.qkv_clip.value_or(-1);
  o.learn_act_clip = yes_or_no(f.learn_act_clip, f.no_learn_act_clip, "learn-act-clip");
  validate(o.spec);
  o.let = yes_or_no(f.let, f.no_let, "let");
  o.let_shift = yes_or_no(f.shift, f.no_shift, "let-shift");
  if (o.let_shift < 0 && f.parity) o.let_shift = 0;
  if (o.token_loss < 0 && f.parity) o.token_loss = 0;
  o.let_up_to_down = f.up_down;
  o.untied_pairs = f.untied || f.parity;
  o.one_consumer = f.one_consumer || f.parity;
  o.signed_max = f.signed_max;
  if (f.let_lr && !(*f.let_lr > 0)) throw UsageError("--let-lr: above 0");
  if (f.alpha && !(*f.alpha >= 0 && *f.alpha <= 1)) throw UsageError("--alpha: 0 to 1");
  o.let_lr = f.let_lr.value_or(-1);
  o.alpha = f.alpha.value_or(-1);
  if (!f.rotate.empty() && f.rotate != "residual" && f.rotate != "norms")
    throw UsageError(fmt::format("--rotate {}: residual or norms wanted", f.rotate));
  if (!f.rotate.empty()) o.rotate_norms = f.rotate == "norms";
  if (f.rotation_seed && *f.rotation_seed < 0) throw UsageError("--rotation-seed: 0 or more");
  o.rotation_seed = static_cast<uint64_t>(f.rotation_seed.value_or(0));
}

void check_transform(const TransformFlags& f, const quant::Recipe& r) {
  for (const auto& [given, name] : {std::pair(f.rotation_seed.has_value(), "--rotation-seed"),
                                    std::pair(!f.rotate.empty(), "--rotate")})
    if (given && !r.rotation)
      throw UsageError(fmt::format("{}: method {} rotates nothing", name, r.name));
  const quant::ActivationBits bits = r.spec.activations();
  if (f.act_clip && bits.linear == 16)
    throw UsageError("--act-clip: inputs of matrices are not quantised; add --abits");
  if (f.qkv_clip && bits.q == 16 && bits.k == 16 && bits.v == 16)
    throw UsageError("--qkv-clip: q, k and v are not quantised; add --abits");
  if ((f.let && !r.let) || (f.no_let && r.let))
    throw UsageError(fmt::format("--transform {} and --{}let exclude each other", r.line.transform,
                                 f.let ? "" : "no-"));
  if (f.let && !r.train.clips)
    throw UsageError(fmt::format(
        "--let: method {} learns nothing of it; --transform let takes it as it starts", r.name));
  if (r.let) return;
  const std::pair<bool, const char*> needs_let[] = {{f.shift, "--let-shift"},
                                                    {f.up_down, "--let-up-down"},
                                                    {f.untied, "--untied-qk"},
                                                    {f.signed_max, "--signed-max"},
                                                    {f.one_consumer, "--one-consumer"}};
  for (const auto& [given, name] : needs_let)
    if (given)
      throw UsageError(fmt::format("{}: there is no transformation to act on; add --let", name));
}

}  // namespace omq
