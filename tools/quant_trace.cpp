// omq-quant trace: one group of weights on its way to the stored bytes and back.
#include "models/checkpoint.h"

#include <CLI/CLI.hpp>

#include "models/json_file.h"
#include "models/packed_model.h"
#include "tools/quant_commands.h"
#include "tools/quant_options.h"
#include "tools/trace.h"

namespace omq {
namespace {

using cli::UsageError;

struct TraceCommand {
  QuantOptions quant;
  std::filesystem::path packed;
  TraceOf of;
  int64_t show = 16;
  bool as_json = false, setting_given = false;
};

bool parse_options(const cli::Args& args, TraceCommand& c) {
  CLI::App app(
      "Follows one group of weights from the checkpoint to the stored bytes and back. For an\n"
      "unquantised model it shows the grid on which calibration starts; for a packed one the "
      "bytes\n"
      "of its file; with -m MODEL --packed DIR both ends.",
      "omq-quant trace");
  SettingFlags setting;
  app.add_option("-m,--model", c.quant.model, "checkpoint, or the output of omq-quant (required)")
      ->type_name("PATH");
  app.add_option("--packed", c.packed, "the output of omq-quant that was made from -m")
      ->type_name("DIR");
  app.add_option("--layer", c.of.layer, "block (default 0)")->type_name("N");
  app.add_option("--linear", c.of.linear, "matrix (default q_proj)")->type_name("NAME");
  app.add_option("--row", c.of.row, "row, an output channel (default 0)")->type_name("N");
  app.add_option("--group", c.of.group, "group of the row (default 0)")->type_name("N");
  app.add_option("--show", c.show, "how many columns of the group to print (default 16; 0: all)")
      ->type_name("N");
  app.add_flag("--json", c.as_json, "everything as one JSON object");
  add_setting_options(app, c.quant, setting);
  if (!cli::parse(app, args)) return false;
  if (c.quant.model.empty()) throw UsageError("-m MODEL is missing");
  if (c.show < 0) throw UsageError("--show: 0 or more");
  for (const char* name : {"--method", "--preset", "--wbits", "--group-size", "--symmetric"})
    c.setting_given = c.setting_given || app.get_option(name)->count() > 0;
  settle_setting(setting, c.quant);
  return true;
}

}  // namespace

int quant_trace(const cli::Args& args) {
  TraceCommand c;
  if (!parse_options(args, c)) return 0;
  if (c.packed.empty() && PackedConfig::of(open_checkpoint(c.quant.model)->config()))
    std::swap(c.packed, c.quant.model);
  if (!c.packed.empty() && c.setting_given)
    throw UsageError(fmt::format("{} says itself how it is quantised; leave out bits and method",
                                 c.packed.string()));
  const quant::Recipe recipe = quant::make_recipe(c.quant.method, c.quant.recipe);
  const nlohmann::json t = trace(c.of, c.quant.model, c.packed, recipe);
  if (c.as_json)
    fmt::print("{}\n", json_text(t));
  else
    print_trace(t, c.show);
  return t["holds"].get<bool>() ? 0 : 1;
}

}  // namespace omq
