// Packed experts in memory when not all of them fit: those used last. The others stay in the model's file.
#pragma once
#include <cstdint>
#include <list>
#include <vector>

#include "cpu/memory.h"

namespace kt {

// Slots of one size for units: a unit is one expert of one layer with all its weights.
class ExpertCache {
 public:
  // As many slots as `bytes` hold, at most one for each unit. std::bad_alloc.
  ExpertCache(size_t bytes, size_t slot_bytes, int64_t units);

  int64_t slots() const { return slots_; }

  // Where the unit is, which becomes the one used last; nullptr if it is not here.
  uint8_t* find(int64_t unit);
  bool has(int64_t unit) const { return slot_of_[unit] >= 0; }

  // A slot for a unit that is not here, instead of the unit that has been unused for longest. What is wanted at once may
  // not be more than slots(), and what is here of it must have been found before.
  uint8_t* take(int64_t unit);

  // Forgets a unit that is here.
  void drop(int64_t unit);

 private:
  uint8_t* at(int64_t slot) const { return memory_.data() + slot * slot_bytes_; }

  size_t slot_bytes_;
  int64_t slots_;
  Mapping memory_;
  std::list<int64_t> order_;                          // slots, the one used last first
  std::vector<std::list<int64_t>::iterator> places_;  // of each slot in order_
  std::vector<int64_t> slot_of_, unit_of_;            // -1: none
};

}  // namespace kt
