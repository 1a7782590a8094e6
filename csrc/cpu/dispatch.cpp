#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace kt {
namespace {

KernelTable with_tiles(const char* name, const TileKernels& tiles) {
  KernelTable table = kAvx512Bf16;
  table.name = name;
  table.gemm = tiles.gemm;
  table.peak = tiles.peak;
  return table;
}

struct Candidate {
  const KernelTable* table;
  bool usable;
};

std::vector<const KernelTable*> list_tables() {
  static const KernelTable amx = with_tiles("amx", kAmxTiles);
  const Candidate best_first[] = {
      {&amx, isa().amx},
      {&kAvx512Bf16, isa().avx512_bf16},
      {&kAvx512, isa().avx512},
      {&kAvx2, isa().avx2},
      {&kReference, true},
  };
  const char* env = std::getenv("KT_MAX_ISA");
  const std::string_view cap = env ? env : "";
  bool allowed = cap.empty();
  std::vector<const KernelTable*> tables;
  std::string names;
  for (const Candidate& c : best_first) {
    allowed = allowed || cap == c.table->name;
    if (allowed && c.usable) tables.push_back(c.table);
    names += std::string(names.empty() ? "" : ", ") + c.table->name;
  }
  if (!allowed) throw std::invalid_argument("KT_MAX_ISA=" + std::string(cap) + ": not one of " + names);
  return tables;
}

}  // namespace

const std::vector<const KernelTable*>& usable_tables() {
  static const std::vector<const KernelTable*> tables = list_tables();
  return tables;
}

const KernelTable* best_table() { return usable_tables().front(); }

const KernelTable* emulated_table() {
  static const KernelTable emulated = with_tiles("amx_emulated", kEmulatedTiles);
  return find_table(kAvx512Bf16.name) == nullptr ? nullptr : &emulated;
}

const KernelTable* find_table(std::string_view name) {
  for (const KernelTable* t : usable_tables())
    if (name == t->name) return t;
  if (name == "amx_emulated") return emulated_table();
  return nullptr;
}

}  // namespace kt
