#include "ops/expert_cache.h"

#include <algorithm>

namespace kt {

ExpertCache::ExpertCache(size_t bytes, size_t slot_bytes, int64_t units)
    : slot_bytes_(slot_bytes),
      slots_(std::min(static_cast<int64_t>(bytes / slot_bytes), units)),
      memory_(slots_ * slot_bytes),
      slot_of_(units, -1),
      unit_of_(slots_, -1) {
  for (int64_t slot = 0; slot < slots_; ++slot) {
    order_.push_back(slot);
    places_.push_back(std::prev(order_.end()));
  }
}

uint8_t* ExpertCache::find(int64_t unit) {
  const int64_t slot = slot_of_[unit];
  if (slot < 0) return nullptr;
  order_.splice(order_.begin(), order_, places_[slot]);
  return at(slot);
}

uint8_t* ExpertCache::take(int64_t unit) {
  const int64_t slot = order_.back();
  if (unit_of_[slot] >= 0) slot_of_[unit_of_[slot]] = -1;
  unit_of_[slot] = unit;
  slot_of_[unit] = slot;
  return find(unit);
}

void ExpertCache::drop(int64_t unit) {
  unit_of_[slot_of_[unit]] = -1;
  slot_of_[unit] = -1;
}

}  // namespace kt
