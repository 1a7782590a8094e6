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

// For tests: "amx_emulated", which is the table "amx" with instructions that every processor with AVX-512 BF16 has. Null
// where kAvx512Bf16 is not usable. Never the best table.
const KernelTable* emulated_table();

// The table of that name if it is usable, or the emulated one; else null.
const KernelTable* find_table(std::string_view name);

}  // namespace kt
