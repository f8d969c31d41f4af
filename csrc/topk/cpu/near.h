// Rows whose scores are spread as those of the row before: the threshold lies near the one found
// there. One pass counts the entries above the neighbourhood and packs those inside, a few dozen,
// of which the rank is counted; a second pass packs the entries chosen.
#pragma once

#include "topk/cpu/threshold_search.h"

namespace tokred::TOKRED_ISA {

// Where the threshold is expected: nowhere until one is known, or where it is missed too often.
struct Neighbourhood {
  float center = 0, reach = kNaN;
  int misses = 0;

  bool known() const { return reach > 0; }
  void miss() {
    reach = kNaN;
    ++misses;
  }
  // `excess` more entries were above `below` than above the threshold.
  void learn(float threshold, float below, int64_t excess) {
    constexpr int kMostMisses = 4;
    constexpr float kReach = 14.0f;  // entries to each side
    if (misses >= kMostMisses) return;
    center = threshold;
    reach = (threshold - below) * (kReach / static_cast<float>(excess));
  }
  // `inside` entries were in it, the threshold among them.
  void move(float threshold, int64_t inside) {
    constexpr float kAim = 28.0f;
    const float ratio = kAim / static_cast<float>(inside);
    if (misses > 0) --misses;
    center += (threshold - center) * 0.25f;
    reach *= ratio < 0.5f ? 0.5f : ratio > 2.0f ? 2.0f : ratio;
  }
};

inline constexpr int64_t kMostNear = 4 * kLanes;

// Finds exactly the best `wanted` candidates where the threshold lies in the neighbourhood.
template <class T>
bool find_near(const Candidates<T>& c, int64_t capacity, Neighbourhood& near, Entries& found) {
  const float from = near.center - near.reach;
  const f32x16 low = splat(from > c.floor ? from : c.floor), high = splat(near.center + near.reach);
  alignas(64) float inside[kMostNear + 2 * kLanes];
  i32x16 total = splat(0);
  int64_t count = 0;
  for (int64_t i = 0; i < c.n && count <= kMostNear; i += kLanes) {
    const f32x16 v = load_entries(c.x, i, c.n);
    total = count_greater(total, v, high);
    pack_between(v, low, high, inside, count);
  }
  const int64_t rest = c.wanted - lane_total(total);
  if (count > kMostNear || rest <= 0 || rest > count) {
    near.miss();
    return false;
  }
  store(inside + count, splat(kNaN));
  const Cut cut = cut_among(inside, count, rest);
  found.count = 0;
  found.below = cut.threshold;
  append(c.x, c.n, c.first, cut, capacity, found);
  near.move(cut.threshold, count);
  return true;
}

}  // namespace tokred::TOKRED_ISA
