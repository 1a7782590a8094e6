// Which kernel table runs.
#pragma once
#include <string_view>
#include <vector>

#include "cpu/kernel_table.h"

namespace kt {

// The tables that this process may use, best first; never empty, since the last is `reference`. The environment
// variable KT_MAX_ISA names the best one allowed. Throws std::invalid_argument when it names none.
const std::vector<const KernelTable*>& usable_tables();

const KernelTable* best_table();

// The usable table of that name, or null.
const KernelTable* find_table(std::string_view name);

}  // namespace kt
