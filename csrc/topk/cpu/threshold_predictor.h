// topk of rows whose scores are spread as those of the row before: predicts an interval that holds
// the threshold. One pass packs the entries above its lower end, few more than are wanted; those
// inside the interval, a few dozen, are ranked to find the threshold.
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
  // hold 12 entries on either side. No more predictions after four misses that no hits made good.
  void learn(float threshold, float below, int64_t excess) {
    constexpr int kMaxMisses = 4;
    constexpr float kEntries = 12.0f;
    if (misses >= kMaxMisses) return;
    center = threshold;
    radius = (threshold - below) * (kEntries / static_cast<float>(excess));
  }
  // After a hit with `inside` entries in the interval: it moves a quarter of the way, and widens or
  // narrows towards 24 entries, by at most a factor of two. Of 40 entries inside it keeps 0.6 of
  // its radius.
  void adapt(float threshold, int64_t inside) {
    constexpr float kEntries = 24.0f;
    const float ratio = kEntries / static_cast<float>(inside);
    if (misses > 0) --misses;
    center += (threshold - center) * 0.25f;
    radius *= ratio < 0.5f ? 0.5f : ratio > 2.0f ? 2.0f : ratio;
  }
};

inline constexpr int64_t kMaxInside = 4 * kLanes;

// Finds the best `wanted` candidates, exactly where the threshold lies in the predicted interval
// and with some more where it lies above it; returns false where it lies below.
template <class T>
bool find_predicted(const Candidates<T>& c, int64_t capacity, ThresholdPredictor& predictor,
                    Entries& found) {
  const float low = predictor.center - predictor.radius;
  if (!find_above(c, low > c.floor ? low : c.floor, capacity, found)) {
    predictor.miss();
    return false;
  }
  if (found.count <= c.wanted) return true;
  alignas(64) float inside[kMaxInside + 2 * kLanes];
  const int64_t n = fill_up(found);
  const f32x16 below = splat(found.below), high = splat(predictor.center + predictor.radius);
  int64_t count = 0;
  for (int64_t i = 0; i < n && count <= kMaxInside; i += kLanes) {
    pack_between(load(found.value + i), below, high, inside, count);
  }
  const int64_t rest = c.wanted - (found.count - count);
  if (count > kMaxInside || rest <= 0) return true;
  store(inside + count, splat(kNaN));
  const Threshold threshold = threshold_among(inside, count, rest);
  keep_chosen(found, n, threshold);
  found.below = threshold.value;
  predictor.adapt(threshold.value, count);
  return true;
}

}  // namespace tokred::TOKRED_ISA
