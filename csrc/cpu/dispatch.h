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

// For tests: "amx_emulated" and "avxvnni_emulated", which are the tables "amx" and "avxvnni" with instructions that every
// processor with AVX-512 BF16, or AVX2, has; those of them whose base is usable. Never the best table.
const std::vector<const KernelTable*>& emulated_tables();

// The table of that name if it is usable or emulated; else null.
const KernelTable* find_table(std::string_view name);

}  // namespace kt
