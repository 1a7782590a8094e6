#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace kt {
namespace {

KernelTable with_products(const char* name, KernelTable table, const ProductKernels& own) {
  table.name = name;
  table.gemm = own.gemm;
  table.peak = own.peak;
  return table;
}

struct Candidate {
  const KernelTable* table;
  bool usable;
};

std::vector<const KernelTable*> list_tables() {
  static const KernelTable amx = with_products("amx", kAvx512Bf16, kAmxTiles);
  static const KernelTable avxvnni = with_products("avxvnni", kAvx2, kAvxVnniProducts);
  const Candidate best_first[] = {
      {&amx, isa().amx},
      {&kAvx512Bf16, isa().avx512_bf16},
      {&kAvx512, isa().avx512},
      {&avxvnni, isa().avxvnni},
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

const std::vector<const KernelTable*>& emulated_tables() {
  static const KernelTable amx = with_products("amx_emulated", kAvx512Bf16, kEmulatedTiles);
  static const KernelTable avxvnni = with_products("avxvnni_emulated", kAvx2, kEmulatedVnniProducts);
  static const std::vector<const KernelTable*> tables = [] {
    std::vector<const KernelTable*> found;
    for (const KernelTable* t : usable_tables()) {
      if (t == &kAvx512Bf16) found.push_back(&amx);
      if (t == &kAvx2) found.push_back(&avxvnni);
    }
    return found;
  }();
  return tables;
}

const KernelTable* find_table(std::string_view name) {
  for (const auto* tables : {&usable_tables(), &emulated_tables()})
    for (const KernelTable* t : *tables)
      if (name == t->name) return t;
  return nullptr;
}

}  // namespace kt
