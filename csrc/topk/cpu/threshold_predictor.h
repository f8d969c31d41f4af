// topk of rows whose scores are distributed like those of the row before: predicts a bound that a
// few more entries exceed than are wanted, and one pass packs these. From how many they are follows
// about where among them the threshold lies: the few near there, often one vector, are ranked.
#pragma once

#include "topk/cpu/threshold_search.h"

namespace tokred::TOKRED_ISA {

// Predicts the threshold of a row, and how far apart the scores around it are. Without a
// prediction, before the first threshold is known or after a miss, that distance is NaN.
struct ThresholdPredictor {
  float center = 0, spacing = kNaN;
  int misses = 0;

  bool ready() const { return spacing > 0; }
  void miss() {
    spacing = kNaN;
    ++misses;
  }
  // Learns from a row in which `excess` entries lay between `below` and its threshold: moves the
  // prediction a quarter of the way there, or all of it where there was none. After kMaxMisses
  // misses it stops predicting.
  void learn(float threshold, float below, int64_t excess) {
    constexpr int kMaxMisses = 4;
    if (misses >= kMaxMisses) return;
    const float weight = ready() ? 0.25f : 1.0f;
    const float found = (threshold - below) / static_cast<float>(excess);
    center += (threshold - center) * weight;
    spacing = ready() ? spacing + (found - spacing) * weight : found;
  }
};

// So many entries should be packed beside those that are wanted: with k = 64 of 289 the number
// above a bound varies by 8 from row to row, and search_limit() leaves room for twice as many.
TOKRED_INLINE int64_t packed_excess(int64_t wanted) { return wanted / 8 + kLanes / 2; }

inline constexpr int64_t kMaxInside = 4 * kLanes;

// Packs the candidates above a predicted bound, which moves where they were too few or too many.
template <class T>
bool find_above_predicted(const Candidates<T>& c, int64_t capacity, ThresholdPredictor& predictor,
                          Entries& found) {
  constexpr int kTries = 3;
  const float step = predictor.spacing * static_cast<float>(packed_excess(c.wanted));
  float low = predictor.center - step;
  for (int i = 0; i < kTries; ++i) {
    if (find_above(c, low > c.floor ? low : c.floor, capacity, found)) return true;
    low += found.count > 0 ? -step : step;  // none are counted where they were too many
  }
  predictor.miss();
  return false;
}

// Finds the best `wanted` candidates; with some more where the threshold is not where it was
// expected. Returns false where the prediction is of no use.
template <class T>
bool find_predicted(const Candidates<T>& c, int64_t capacity, ThresholdPredictor& predictor,
                    Entries& found) {
  if (!find_above_predicted(c, capacity, predictor, found)) return false;
  const int64_t excess = found.count - c.wanted;
  if (excess <= 0) return true;
  // Scores that lie `spacing` apart on average: of sixteen, the last is 4 of them off, typically.
  const auto expected = static_cast<float>(excess);
  const float reach = predictor.spacing * (1.5f * __builtin_sqrtf(expected) + 1.5f);
  const float middle = found.below + predictor.spacing * expected;
  alignas(64) float inside[kMaxInside + 2 * kLanes];
  const int64_t n = fill_up(found);
  const f32x16 low = splat(middle - reach > found.below ? middle - reach : found.below);
  const f32x16 high = splat(middle + reach);
  int64_t count = 0, above = 0;
  for (int64_t i = 0; i < n && count <= kMaxInside; i += kLanes) {
    above += bit_count(greater_mask(load(found.value + i), high));
    pack_between(load(found.value + i), low, high, inside, count);
  }
  const int64_t rest = c.wanted - above;
  if (count > kMaxInside || rest <= 0 || rest > count) return true;
  store(inside + count, splat(kNaN));
  const Threshold threshold = threshold_among(inside, count, rest);
  keep_chosen(found, n, threshold);
  predictor.learn(threshold.value, found.below, excess);
  if (predictor.misses > 0) --predictor.misses;
  found.below = threshold.value;
  return true;
}

}  // namespace tokred::TOKRED_ISA
