// The router: which experts each row goes to, and with what weights.
#pragma once
#include "ops/step.h"

namespace kt {

// What engine/program.py says of Route, for each row by itself; sums are in the order of the experts, or of the choice.
RowFunction make_route(const KernelTable& table, const Model& model, const Values& values, const op::Route& op);

}  // namespace kt
