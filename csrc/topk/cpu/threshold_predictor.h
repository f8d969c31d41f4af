// topk of rows whose scores are spread as those of the row before: predicts an interval that holds
// the threshold. One pass counts the entries above the interval and packs those inside, a few
// dozen, to find the one of the rank sought; a second pass packs the entries chosen.
#pragma once

#include "topk/cpu/threshold_search.h"

namespace tokred::TOKRED_ISA {

// Predicts the threshold of a row within center +- radius. Without a prediction, before the first
// threshold is known or after a miss, the radius is NaN.
struct ThresholdPredictor {
  float center = 0, radius = kNaN;
  int misses = 0;

  bool ready() const { return radius > 0; }
  void miss() {
    radius = kNaN;
    ++misses;
  }
  // From a search that left `excess` entries between `below` and the threshold: the interval is to
  // hold 14 entries on either side. No more predictions after four misses that no hits made good.
  void learn(float threshold, float below, int64_t excess) {
    constexpr int kMaxMisses = 4;
    constexpr float kEntries = 14.0f;
    if (misses >= kMaxMisses) return;
    center = threshold;
    radius = (threshold - below) * (kEntries / static_cast<float>(excess));
  }
  // After a hit with `inside` entries in the interval: it moves a quarter of the way, and widens or
  // narrows towards 28 entries, by at most a factor of two. Of 40 entries inside it keeps 0.7 of
  // its radius.
  void adapt(float threshold, int64_t inside) {
    constexpr float kEntries = 28.0f;
    const float ratio = kEntries / static_cast<float>(inside);
    if (misses > 0) --misses;
    center += (threshold - center) * 0.25f;
    radius *= ratio < 0.5f ? 0.5f : ratio > 2.0f ? 2.0f : ratio;
  }
};

inline constexpr int64_t kMaxInside = 4 * kLanes;

// Finds exactly the best `wanted` candidates where the threshold lies in the predicted interval,
// else returns false.
template <class T>
bool find_predicted(const Candidates<T>& c, int64_t capacity, ThresholdPredictor& predictor,
                    Entries& found) {
  const float from = predictor.center - predictor.radius;
  const f32x16 low = splat(from > c.floor ? from : c.floor);
  const f32x16 high = splat(predictor.center + predictor.radius);
  alignas(64) float inside[kMaxInside + 2 * kLanes];
  i32x16 total = splat(0);
  int64_t count = 0;
  for (int64_t i = 0; i < c.n && count <= kMaxInside; i += kLanes) {
    const f32x16 v = load_entries(c.x, i, c.n);
    total = count_greater(total, v, high);
    pack_between(v, low, high, inside, count);
  }
  const int64_t rest = c.wanted - sum_lanes(total);
  if (count > kMaxInside || rest <= 0 || rest > count) {
    predictor.miss();
    return false;
  }
  store(inside + count, splat(kNaN));
  const Threshold threshold = threshold_among(inside, count, rest);
  found.count = 0;
  found.below = threshold.value;
  append(c.x, c.n, c.first, threshold, capacity, found);
  predictor.adapt(threshold.value, count);
  return true;
}

}  // namespace tokred::TOKRED_ISA
