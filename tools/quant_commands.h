// The subcommands of omq-quant: each a function over its own arguments, in a file of its own.
#pragma once

#include "tools/cli.h"

namespace omq {

int quant_audit(const cli::Args& args);
int quant_trace(const cli::Args& args);

}  // namespace omq
