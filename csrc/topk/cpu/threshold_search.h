// topk of one row by threshold search: counting passes narrow a bracket until a threshold has at
// least k scores above it and few more, then one pass packs the scores above. The first threshold
// tried (a sample of a long row suggests one) never changes the entries that are chosen.
#pragma once

#include "topk/cpu/sort.h"

namespace tokred::TOKRED_ISA {

// The start of the Vec that holds x[i, n), or its first sixteen: the last Vec of a row begins
// before i, so that no element behind n is read.
TOKRED_INLINE int64_t vec_start(int64_t i, int64_t n) {
  return i + kLanes <= n || n < kLanes ? i : n - kLanes;
}
// That Vec as floats, NaN before i and from n on.
template <class T>
TOKRED_INLINE f32x16 load_entries(const T* x, int64_t i, int64_t n) {
  if (i + kLanes <= n) return load_as(x + i);
  if (n >= kLanes) {
    const i32x16 known = splat(static_cast<int32_t>(i - (n - kLanes)));
    return select_greater(known, load(kLaneNumbers), splat(kNaN), load_as(x + n - kLanes));
  }
  float lane[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) lane[j] = i + j < n ? to_float(x[i + j]) : kNaN;
  return load(lane);
}

template <class T>
int64_t count_above(const T* x, int64_t n, float threshold) {
  const f32x16 limit = splat(threshold);
  i32x16 total[2] = {splat(0), splat(0)};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    total[0] = count_greater(total[0], load_as(x + i), limit);
    total[1] = count_greater(total[1], load_as(x + i + kLanes), limit);
  }
  for (; i < n; i += kLanes) total[0] = count_greater(total[0], load_entries(x, i, n), limit);
  return sum_lanes(total[0] + total[1]);
}

// Of the scores above a floor: their number, minimum and maximum.
struct ScoreRange {
  int64_t count;
  float min, max;
};

template <class T>
ScoreRange score_range(const T* x, int64_t n, float floor) {
  const f32x16 limit = splat(floor), infinity = splat(kInfinity<float>);
  i32x16 total = splat(0);
  f32x16 highest = limit, lowest = infinity;
  for (int64_t i = 0; i < n; i += kLanes) {
    const f32x16 v = load_entries(x, i, n);
    total = count_greater(total, v, limit);
    highest = max(v, highest);
    lowest = min(select_greater(v, limit, v, infinity), lowest);
  }
  return {sum_lanes(total), min_lane(lowest), max_lane(highest)};
}

// Thresholds on both sides of the one sought: more than enough entries are above `low`, too few
// above `high`.
struct Bracket {
  float low, high;
  int64_t above_low, above_high;
};

// The largest float below x > -inf.
TOKRED_INLINE float next_below(float x) {
  return from_order_key(order_key(x == 0.0f ? -0.0f : x) - 1);
}
// Of scores of which more than enough are above the floor.
TOKRED_INLINE Bracket bracket_of(const ScoreRange& range) {
  return {next_below(range.min), range.max, range.count, 0};
}

// Chooses the entries above `value` and the first `ties` of those equal to it.
struct Threshold {
  float value;
  int64_t ties;
};

// A value strictly inside the bracket (two or more floats apart). Interpolation search of the
// counts, over values and then over order keys, that is, over magnitudes; every fifth step is a
// bisection of the keys, so that any distribution takes at most 160 steps. Rows of softmax scores
// take 3 to 5.
TOKRED_INLINE float probe(const Bracket& b, int64_t target, int step) {
  const int phase = step % 5;
  const bool halves = phase == 2 || phase == 4;
  const float share = halves ? 0.5f
                             : static_cast<float>(b.above_low - target) /
                                   static_cast<float>(b.above_low - b.above_high);
  const float t = b.low + (b.high - b.low) * share;
  if ((phase == 0 || phase == 2) && t > b.low && t < b.high) return t;
  const int64_t low = order_key(b.low), high = order_key(b.high);
  const int64_t key = low + static_cast<int64_t>(share * static_cast<float>(high - low));
  return from_order_key(static_cast<int32_t>(key <= low ? low + 1 : key >= high ? high - 1 : key));
}

// Moves the ends of the bracket to the minimum and the maximum of the scores inside.
template <class T>
void tighten(Bracket& b, const T* x, int64_t n) {
  const f32x16 low = splat(b.low), high = splat(b.high), infinity = splat(kInfinity<float>);
  f32x16 lowest = high, highest = low;
  for (int64_t i = 0; i < n; i += kLanes) {
    const f32x16 v = load_entries(x, i, n);
    lowest = min(select_greater(v, low, v, infinity), lowest);
    highest = max(select_greater(v, high, low, v), highest);
  }
  b.low = next_below(min_lane(lowest));
  b.high = max_lane(highest);
}

// The lanes that the threshold chooses; threshold.ties counts down those that are equal.
TOKRED_INLINE uint32_t chosen_mask(f32x16 v, f32x16 limit, Threshold& threshold) {
  const uint32_t mask = greater_mask(v, limit);
  const uint32_t equal = lowest_bits(equal_mask(v, limit), threshold.ties);
  threshold.ties -= bit_count(equal);
  return mask | equal;
}

// Ranks kVectors vectors of value[0, count) among all of it; `lowest` becomes the minimum of what
// it was and of the values whose rank is below the limit.
template <int kVectors>
TOKRED_INLINE void lowest_chosen(const float* value, int64_t count, const float* own_value,
                                 i32x16 limit, f32x16& lowest) {
  const f32x16 infinity = splat(kInfinity<float>);
  f32x16 own[kVectors];
  i32x16 rank[kVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) own[j] = load(own_value + j * kLanes), rank[j] = splat(0);
  for (int64_t i = 0; i < count; ++i) {
    const f32x16 other = splat(value[i]);
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) rank[j] = count_greater(rank[j], other, own[j]);
  }
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) {
    const f32x16 chosen = select_greater(limit, rank[j], own[j], infinity);
    lowest = min(select_number(own[j], chosen, infinity), lowest);
  }
}

// The threshold that leaves the best `rest` of value[0, count), by the rank of every value; NaN
// lies behind them up to whole vectors.
inline Threshold threshold_among(const float* value, int64_t count, int64_t rest) {
  const i32x16 limit = splat(static_cast<int32_t>(rest));
  f32x16 lowest = splat(kInfinity<float>);
  int64_t first = 0;
  for (; first + kLanes < count; first += 2 * kLanes) {
    lowest_chosen<2>(value, count, value + first, limit, lowest);
  }
  if (first < count) lowest_chosen<1>(value, count, value + first, limit, lowest);
  const float kth = min_lane(lowest);
  int64_t above = 0, equal = 0;
  for (first = 0; first < count; first += kLanes) {
    above += bit_count(greater_mask(load(value + first), splat(kth)));
    equal += bit_count(equal_mask(load(value + first), splat(kth)));
  }
  const int64_t ties = rest - above;
  return ties == equal ? Threshold{next_below(kth), 0} : Threshold{kth, ties};
}

// The threshold that leaves exactly `wanted` of x[0, n), where no more than a Vec of them are
// inside the bracket.
template <class T>
Threshold threshold_inside(const Bracket& b, int64_t wanted, const T* x, int64_t n) {
  const f32x16 low = splat(b.low), high = splat(b.high);
  float inside[2 * kLanes];
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    pack_between(load_entries(x, i, n), low, high, inside, count);
  }
  store(inside + count, splat(kNaN));
  return threshold_among(inside, count, wanted - b.above_high);
}

// Narrows the bracket until a threshold leaves at least `at_least` of x[0, n), and at most
// `at_most`. Where so many are equal that no value does, `ties` leaves exactly at_least, and b.low
// is the largest value that leaves more. `hint` is tried first where it is inside.
template <class T>
Threshold search(Bracket& b, int64_t at_least, int64_t at_most, const T* x, int64_t n,
                 float hint = kNaN) {
  bool in_gap = false;
  for (int step = hint > b.low && hint < b.high ? -1 : 0;; ++step) {
    // Where a step excludes nothing, scores may be equal: the ends may be close to each other.
    if (in_gap) tighten(b, x, n);
    if (at_least == at_most && b.above_low - b.above_high <= kLanes) {
      return threshold_inside(b, at_least, x, n);
    }
    const int64_t apart = static_cast<int64_t>(order_key(b.high)) - order_key(b.low);
    if (apart <= 1) return {b.high, at_least - b.above_high};
    const float t = step < 0 ? hint : probe(b, at_least + (at_most - at_least) / 2, step);
    const int64_t above = count_above(x, n, t);
    in_gap = !in_gap && (above == b.above_low || above == b.above_high);
    if (above < at_least) {
      b.high = t, b.above_high = above;
    } else if (above > at_most) {
      b.low = t, b.above_low = above;
    } else {
      return {t, 0};
    }
  }
}

// Appends the entries of x[0, n), which starts at position `first`, that the threshold chooses.
// False where they are more than `capacity`. kSparse: few are expected, so that it pays to skip
// four vectors at once.
template <bool kSparse, bool kTies, class T>
bool append_above(const T* x, int64_t n, int64_t first, Threshold threshold, int64_t capacity,
                  Entries& to) {
  const f32x16 limit = splat(threshold.value);
  float* const value = to.value;
  int32_t* const index = to.index;
  int64_t count = to.count;
  const auto append = [&](f32x16 v, i32x16 start) {
    v = v + splat(0.0f);  // makes -0 into +0, which are equal
    if constexpr (kTies) {
      const uint32_t mask = chosen_mask(v, limit, threshold);
      pack_lanes(value + count, v, mask);
      pack_lanes(index + count, load(kLaneNumbers) + start, mask);
      count += bit_count(mask);
    } else {
      append_greater(v, limit, start, value, index, count);
    }
    return count <= capacity;
  };
  const auto position = [&](int64_t i) { return splat(static_cast<int32_t>(first + i)); };
  int64_t i = 0;
  if constexpr (kSparse) {
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      f32x16 v[4];
      for (int part = 0; part < 4; ++part) v[part] = load_as(x + i + part * kLanes);
      // A NaN loses against any number.
      const f32x16 highest = max(max(v[0], max(v[1], limit)), max(v[2], max(v[3], limit)));
      if (!greater_mask(highest, limit)) continue;
      for (int part = 0; part < 4; ++part) {
        if (!append(v[part], position(i + part * kLanes))) return false;
      }
    }
  }
  i32x16 start = position(i);
  for (; i + kLanes <= n; i += kLanes, start = start + splat(kLanes)) {
    if (!append(load_as(x + i), start)) return false;
  }
  if (i < n && !append(load_entries(x, i, n), position(vec_start(i, n)))) return false;
  to.count = count;
  return true;
}

template <class T>
bool append(const T* x, int64_t n, int64_t first, Threshold threshold, int64_t capacity,
            Entries& to) {
  if (threshold.ties) return append_above<false, true>(x, n, first, threshold, capacity, to);
  return capacity < n / 64 ? append_above<true, false>(x, n, first, threshold, capacity, to)
                           : append_above<false, false>(x, n, first, threshold, capacity, to);
}

// Keeps of the entries, NaN up to n, those that the threshold chooses, in the order they have.
inline void keep_chosen(Entries& entries, int64_t n, Threshold threshold) {
  const f32x16 limit = splat(threshold.value);
  float* const value = entries.value;
  int32_t* const index = entries.index;
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const f32x16 v = load(value + i);
    const i32x16 position = load(index + i);
    if (threshold.ties == 0) {
      append_greater_of(v, limit, position, value, index, kept);
      continue;
    }
    const uint32_t mask = chosen_mask(v, limit, threshold);
    pack_lanes(value + kept, v, mask);
    pack_lanes(index + kept, position, mask);
    kept += bit_count(mask);
  }
  entries.count = kept;
}

// Ends the values with NaN up to whole vectors; returns their number with those.
inline int64_t fill_up(Entries& entries) {
  const int64_t n = round_up(entries.count, kLanes);
  store(entries.value + entries.count, splat(kNaN));
  return n;
}

// Keeps the best `wanted` candidates. `hint`: the threshold that did so in another row.
inline void keep_best(Entries& entries, int64_t wanted, float& hint) {
  if (entries.count <= wanted) return;
  const int64_t n = fill_up(entries);
  f32x16 highest = load(entries.value);
  for (int64_t i = kLanes; i < n; i += kLanes) highest = max(load(entries.value + i), highest);
  highest = max(highest, splat(-kInfinity<float>));
  Bracket bracket{entries.below, max_lane(highest), entries.count, 0};
  const Threshold threshold = search(bracket, wanted, wanted, entries.value, n, hint);
  hint = threshold.value;
  keep_chosen(entries, n, threshold);
}

// Keeps the best `wanted` forced entries, which may be -inf.
inline void keep_best_forced(Entries& entries, int64_t wanted) {
  if (entries.count <= wanted) return;
  const int64_t n = fill_up(entries);
  const ScoreRange range = score_range(entries.value, n, -kInfinity<float>);
  if (range.count <= wanted)
    return keep_chosen(entries, n, {-kInfinity<float>, wanted - range.count});
  Bracket bracket = bracket_of(range);
  keep_chosen(entries, n, search(bracket, wanted, wanted, entries.value, n));
}

// Candidates of one row: those of x[0, n) above the floor. x[0] stands at position `first`.
template <class T>
struct Candidates {
  const T* x;
  int64_t n, first;
  float floor;
  int64_t wanted;
};

inline constexpr int64_t kShortRow = 2048;
inline constexpr int64_t kSample = 4096;

// Entries that a search should leave at most, as a narrower aim takes more steps: 96 for k = 64.
TOKRED_INLINE int64_t search_limit(int64_t wanted) { return wanted + wanted / 4 + kLanes; }
// Room for them, or for those above a guess in a long row, where one entry of the sample stands for
// many: k = 2048 of 131072 gets 2048 + 1024 + 1024 + 12 * 32 = 4480.
TOKRED_INLINE int64_t found_capacity(int64_t wanted, int64_t n) {
  const int64_t capacity =
      n <= kShortRow ? search_limit(wanted) : wanted + wanted / 2 + 1024 + 12 * (n / kSample);
  return capacity < n ? capacity : n;
}

// Finds the candidates above a threshold; false where they are too few or too many.
template <class T>
bool find_above(const Candidates<T>& c, float threshold, int64_t capacity, Entries& found) {
  found.count = 0;
  found.below = threshold;
  const bool complete = append(c.x, c.n, c.first, Threshold{threshold, 0}, capacity, found);
  return complete && (found.count >= c.wanted || threshold == c.floor);
}

// Finds the best `wanted` candidates, and possibly some more.
template <class T>
void find_by_search(const Candidates<T>& c, int64_t capacity, Entries& found) {
  const ScoreRange range = score_range(c.x, c.n, c.floor);
  if (range.count <= capacity) {
    find_above(c, c.floor, capacity, found);
    found.below = next_below(range.min);
    return;
  }
  const int64_t limit = search_limit(c.wanted);
  Bracket bracket = bracket_of(range);
  const Threshold threshold =
      search(bracket, c.wanted, limit < capacity ? limit : capacity, c.x, c.n);
  found.count = 0;
  found.below = threshold.value;
  append(c.x, c.n, c.first, threshold, capacity, found);
}

// A threshold with probably a few more than `wanted` candidates above it, from a sample of every (n
// / kSample)-th vector of the row. Three standard deviations above the expected rank: of 131072
// columns, k = 2048 expects 64 of the sample and takes the threshold of rank 64 + 24 + 3.
template <class T>
float guess_threshold(const Candidates<T>& c, float* sample) {
  constexpr int64_t kVectors = kSample / kLanes;
  const int64_t step = c.n / kVectors;
  if (c.wanted >= c.n || step < kLanes) return c.floor;
  for (int64_t i = 0; i < kVectors; ++i) store(sample + i * kLanes, load_as(c.x + i * step));
  const float expected = static_cast<float>(c.wanted) * kSample / static_cast<float>(c.n);
  const auto at_least = static_cast<int64_t>(expected + 3 * __builtin_sqrtf(expected) + 3);
  const ScoreRange range = score_range(sample, kSample, c.floor);
  if (range.count <= at_least) return c.floor;
  Bracket bracket = bracket_of(range);
  const Threshold threshold =
      search(bracket, at_least, at_least + at_least / 8 + 1, sample, kSample);
  return threshold.ties ? bracket.low : threshold.value;
}

}  // namespace tokred::TOKRED_ISA
