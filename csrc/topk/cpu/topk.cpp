// Exact top-k of rows. A long row is read once where a guess by sample holds: entries above it are
// packed sixteen at a time, then the few that are left are cut to k or sorted. A short row is cut
// near the threshold of the row before, or packed above it, or searched in the cache. Long rows are
// split among threads where rows are few.
//
// [8, 131072] in fp32: 4.2 MB, 0.1 ms at 40 GB/s; packing is 20 operations a vector of sixteen,
// which keeps two cores busy for about as long, and sorting 2048 entries takes half of it again.
// [18432, 289]: 21 MB, 1 ms; searching takes four times that on one core, two passes over rows that
// resemble each other three times.
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "topk/cpu/near.h"
#include "topk/params.h"

namespace tokred::TOKRED_ISA {
namespace {

// The sizes of a call.
struct Plan {
  int64_t units;       // segments of rows
  int64_t width;       // columns of the widest segment
  int64_t most;        // entries chosen at most
  int64_t found;       // capacity for candidates
  int64_t forced;      // capacity for forced entries
  bool sorts;          // entries are needed in order of their scores
  bool packs;          // candidates are packed into a buffer first, without those to keep
  int64_t chunk_room;  // capacity of a chunk's candidates where rows are split, else 0
  int64_t chunks;
};

constexpr int64_t kChunk = 16384;

Plan plan_of(const TopkParams& p, const Parallel& parallel) {
  Plan plan{};
  plan.units = p.rows * p.segments;
  plan.width = p.block_size > 0 && p.block_size < p.columns ? p.block_size : p.columns;
  plan.most = p.k < plan.width ? p.k : plan.width;
  plan.found = found_capacity(plan.most, plan.width);
  const int64_t ends = p.num_sinks < plan.width - p.num_locals ? p.num_sinks + p.num_locals
                                                               : plan.width;
  plan.forced = p.must_keep.data ? plan.width : ends;
  plan.sorts = p.order == RowOrder::score || p.has_top_p;
  plan.packs = p.must_keep.data;
  plan.chunks = divide_up(plan.width, kChunk);
  const bool splits = !plan.packs && plan.chunks > 1 && plan.units < parallel.threads;
  if (splits) plan.chunk_room = plan.found < kChunk ? plan.found : kChunk;
  return plan;
}

// One worker's memory.
struct Scratch {
  float* packed;    // [width] scores of candidates as fp32, NaN elsewhere
  float* sample;    // [kSample]
  uint64_t* words;  // [2][plan.found]
  Entries forced, found;
  // What served the row before: thresholds to find candidates in a short row, and to keep the best.
  float find_hint, keep_hint;
  Neighbourhood near;
};

Entries take_entries(Slices& memory, int64_t capacity) {
  auto* value = memory.take<float>(capacity + kLanes);
  return {value, memory.take<int32_t>(capacity + kLanes), 0, -kInfinity};
}
Scratch take_scratch(Slices& memory, const Plan& plan) {
  Scratch s{};
  s.find_hint = s.keep_hint = kInfinity;
  if (plan.packs) s.packed = memory.take<float>(plan.width + kLanes);
  if (plan.width > kShortRow) s.sample = memory.take<float>(kSample);
  if (plan.sorts) s.words = memory.take<uint64_t>(2 * plan.found);
  s.forced = take_entries(memory, plan.forced);
  s.found = take_entries(memory, plan.found);
  return s;
}
int64_t scratch_bytes(const Plan& plan) {
  Slices memory(nullptr);
  take_scratch(memory, plan);
  return memory.bytes();
}
Scratch scratch_of(const TopkParams& p, const Plan& plan, int64_t worker) {
  Slices memory(static_cast<char*>(p.workspace) + worker * scratch_bytes(plan));
  return take_scratch(memory, plan);
}

// One segment of a row. Its entries are forced up to `first` and from `last` on.
struct Unit {
  int64_t row, begin, first, last, end;
  int64_t wanted;
};

Unit unit_of(const TopkParams& p, const Plan& plan, int64_t number) {
  const auto between = [](int64_t low, int64_t x, int64_t high) {
    return x < low ? low : x > high ? high : x;
  };
  Unit unit;
  unit.row = p.segments > 1 ? number / p.segments : number;
  const int64_t length = row_number(p.lengths, unit.row, p.columns);
  unit.begin = between(0, (number - unit.row * p.segments) * plan.width, length);
  unit.end = between(unit.begin, unit.begin + plan.width, length);
  unit.first = between(unit.begin, p.num_sinks, unit.end);
  unit.last = between(unit.first, length - p.num_locals, unit.end);
  unit.wanted = row_number(p.row_k, unit.row, plan.most);
  return unit;
}

float floor_of(const TopkParams& p) { return p.has_threshold ? p.threshold : -kInfinity; }

// The score of a forced entry, as it is ranked.
TOKRED_INLINE f32x16 ranked(f32x16 v) { return max(v, splat(-kInfinity)) + splat(0.0f); }

template <class T>
void append_all(const T* x, int64_t begin, int64_t end, Entries& to) {
  for (int64_t i = begin; i < end; i += kLanes) {
    store(to.value + to.count, ranked(load_row(x + i, end - i)));
    store(to.index + to.count, load(kLaneNumbers) + splat(static_cast<int32_t>(i)));
    to.count += end - i < kLanes ? end - i : kLanes;
  }
}

// Copies x[begin, end) to `packed`, and NaN behind them up to whole vectors. Those to keep go to
// `forced`, with NaN in their place.
template <class T>
void pack_candidates(const T* x, const uint8_t* keep, int64_t begin, int64_t end, float* packed,
                     Entries& forced) {
  pack_row(x + begin, end - begin, packed);
  store(packed + (end - begin), splat(kNaN));
  for (int64_t i = begin; i < end; i += kLanes) {
    float* to = packed + (i - begin);
    uint8_t kept[kLanes] = {};
    std::memcpy(kept, keep + i, static_cast<size_t>(end - i < kLanes ? end - i : kLanes));
    const uint32_t mask = nonzero_mask(kept);
    if (!mask) continue;
    pack_lanes(forced.value + forced.count, ranked(load(to)), mask);
    pack_lanes(forced.index + forced.count,
               load(kLaneNumbers) + splat(static_cast<int32_t>(i)), mask);
    forced.count += bit_count(mask);
    for (uint32_t rest = mask; rest; rest &= rest - 1) to[__builtin_ctz(rest)] = kNaN;
  }
}

// Tries a guess, for short rows the threshold of the row before, then searches.
template <class T>
void find(const Candidates<T>& c, int64_t capacity, Scratch& s) {
  if (c.wanted <= 0) return;
  const bool is_short = c.n <= kShortRow;
  const bool tries = is_short && !s.words && s.near.known();
  if (tries && find_near(c, capacity, s.near, s.found)) return;
  const float guess = is_short ? s.find_hint : guess_threshold(c, s.sample);
  if (guess >= c.floor && find_above(c, guess, capacity, s.found)) return;
  find_by_search(c, capacity, s.found);
  if (is_short) s.find_hint = s.found.below;
}

// How many of the sorted entries it takes to exceed top_p, at least min_k.
int64_t count_to_top_p(const TopkParams& p, const float* value, int64_t count) {
  constexpr double kGreatest = 1 << 20;
  constexpr double kOne = static_cast<double>(int64_t{1} << kProbabilityBits);
  const double share = p.top_p < kGreatest ? p.top_p : kGreatest;
  const int64_t limit = share < 0 ? -1 : static_cast<int64_t>(share * kOne);
  int64_t total = 0, within = 0;
  for (; within < count; ++within) {
    const double probability = value[within] > 0 ? value[within] : 0.0;
    total += static_cast<int64_t>((probability < kGreatest ? probability : kGreatest) * kOne);
    if (total > limit) break;
  }
  const int64_t chosen = within + 1 > p.min_k ? within + 1 : p.min_k;
  return chosen < count ? chosen : count;
}

// Writes both kinds of entries, each ascending by position, as one such list.
void merge_by_position(const Entries& a, const Entries& b, float* value, int32_t* index) {
  if (a.count == 0) {
    copy_bytes(value, b.value, 4 * b.count);
    return copy_bytes(index, b.index, 4 * b.count);
  }
  int64_t i = 0, j = 0;
  while (i < a.count || j < b.count) {
    const bool from_a = j == b.count || (i < a.count && a.index[i] < b.index[j]);
    const Entries& from = from_a ? a : b;
    int64_t& next = from_a ? i : j;
    *value++ = from.value[next];
    *index++ = from.index[next++];
  }
}

// Orders what was chosen into the unit's row of the outputs.
void write(const TopkParams& p, int64_t number, int64_t wanted, Scratch& s) {
  float* value = p.values + number * p.k;
  int32_t* index = p.indices + number * p.k;
  keep_best_forced(s.forced, wanted);
  const int64_t rest = wanted - s.forced.count;
  int64_t count = s.forced.count + (s.found.count < rest ? s.found.count : rest);
  if (const int64_t excess = s.found.count - rest; excess > (s.words ? rest / 8 : 0)) {
    keep_best(s.found, rest, s.keep_hint);
    s.near.learn(s.keep_hint, s.found.below, excess);
  }
  if (!s.words) {
    merge_by_position(s.forced, s.found, value, index);
  } else if (count > 0) {
    const int64_t forced = s.forced.count;
    sort_by_score(s.forced, forced, s.words, value, index);
    sort_by_score(s.found, count - forced, s.words, value + forced, index + forced);
    if (p.has_top_p) count = count_to_top_p(p, value, count);
    if (p.order == RowOrder::position) sort_by_position(value, index, count, s.words);
  }
  for (int64_t i = count; i < p.k; ++i) value[i] = -kInfinity;
  for (int64_t i = count; i < p.k; ++i) index[i] = -1;
  p.counts[number] = static_cast<int32_t>(count);
}

// x: the row of the unit.
template <class T>
void choose(const TopkParams& p, const Plan& plan, int64_t number, const T* x, Scratch& s) {
  const Unit unit = unit_of(p, plan, number);
  s.forced.count = s.found.count = 0;
  if (unit.wanted == 0) return write(p, number, 0, s);
  append_all(x, unit.begin, unit.first, s.forced);
  if (plan.packs) {
    pack_candidates(x, row_start<uint8_t>(p.must_keep, unit.row), unit.first, unit.last, s.packed,
                    s.forced);
  }
  append_all(x, unit.last, unit.end, s.forced);
  const int64_t count = unit.last - unit.first, wanted = unit.wanted - s.forced.count;
  if (plan.packs) {
    find(Candidates<float>{s.packed, count, unit.first, floor_of(p), wanted}, plan.found, s);
  } else {
    find(Candidates<T>{x + unit.first, count, unit.first, floor_of(p), wanted}, plan.found, s);
  }
  write(p, number, unit.wanted, s);
}

// Where long rows are fewer than the threads: what each chunk of each row holds.
struct Split {
  float* guess;    // [units]
  int64_t* count;  // [units * chunks], -1 where there were too many
  float* value;    // [units * chunks][room]
  int32_t* index;  // [units * chunks][room]
};

Split take_split(Slices& memory, const Plan& plan) {
  const int64_t chunks = plan.units * plan.chunks, room = plan.chunk_room + kLanes;
  Split split;
  split.guess = memory.take<float>(plan.units);
  split.count = memory.take<int64_t>(chunks);
  split.value = memory.take<float>(chunks * room);
  split.index = memory.take<int32_t>(chunks * room);
  return split;
}

// Joins the chunks of a unit; false where one is missing or they are too many.
bool join(const Plan& plan, const Split& split, int64_t number, Entries& found) {
  const int64_t room = plan.chunk_room + kLanes;
  for (int64_t i = number * plan.chunks; i < (number + 1) * plan.chunks; ++i) {
    const int64_t count = split.count[i];
    if (count < 0 || found.count + count > plan.found) return false;
    copy_bytes(found.value + found.count, split.value + i * room, 4 * count);
    copy_bytes(found.index + found.count, split.index + i * room, 4 * count);
    found.count += count;
  }
  return true;
}

template <class T>
void choose_split(const TopkParams& p, const Plan& plan, const Parallel& parallel) {
  Slices memory(static_cast<char*>(p.workspace) + parallel.threads * scratch_bytes(plan));
  const Split split = take_split(memory, plan);
  const auto candidates = [&](int64_t number) {
    const Unit unit = unit_of(p, plan, number);
    const int64_t forced = unit.first - unit.begin + unit.end - unit.last;
    return Candidates<T>{row_start<T>(p.scores, unit.row) + unit.first, unit.last - unit.first,
                         unit.first, floor_of(p), unit.wanted - forced};
  };
  parallel_tasks(parallel, plan.units, [&](int64_t number, int64_t worker) {
    split.guess[number] = guess_threshold(candidates(number), scratch_of(p, plan, worker).sample);
  });
  parallel_tasks(parallel, plan.units * plan.chunks, [&](int64_t task, int64_t) {
    const Candidates<T> c = candidates(task / plan.chunks);
    const int64_t start = task % plan.chunks * kChunk, rest = c.n - start, room = plan.chunk_room;
    Entries entries{split.value + task * (room + kLanes), split.index + task * (room + kLanes), 0,
                    -kInfinity};
    const bool fits = rest <= 0 || append(c.x + start, rest < kChunk ? rest : kChunk,
                                          c.first + start,
                                          Cut{split.guess[task / plan.chunks], 0}, room, entries);
    split.count[task] = fits ? entries.count : -1;
  });
  parallel_tasks(parallel, plan.units, [&](int64_t number, int64_t worker) {
    const Unit unit = unit_of(p, plan, number);
    const Candidates<T> c = candidates(number);
    Scratch s = scratch_of(p, plan, worker);
    const T* x = row_start<T>(p.scores, unit.row);
    append_all(x, unit.begin, unit.first, s.forced);
    append_all(x, unit.last, unit.end, s.forced);
    s.found.below = split.guess[number];
    const bool complete = c.wanted > 0 && join(plan, split, number, s.found);
    const bool enough = s.found.count >= c.wanted || s.found.below == c.floor;
    if (c.wanted > 0 && !(complete && enough)) find_by_search(c, plan.found, s.found);
    write(p, number, unit.wanted, s);
  });
}

// A short row is searched while the next one comes.
template <class T>
void bring_closer(const T* row, int64_t columns) {
  for (int64_t i = 0; i < columns; i += 64 / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(row + i);
  }
}

template <class T>
void choose_all(const TopkParams& p, const Parallel& parallel) {
  const Plan plan = plan_of(p, parallel);
  if (plan.chunk_room > 0) return choose_split<T>(p, plan, parallel);
  const int64_t step = rows_per_task(plan.width);
  const auto row_of = [&](int64_t number) {
    return row_start<T>(p.scores, p.segments > 1 ? number / p.segments : number);
  };
  parallel_tasks(parallel, divide_up(plan.units, step), [&](int64_t task, int64_t worker) {
    Scratch s = scratch_of(p, plan, worker);
    const int64_t last = (task + 1) * step < plan.units ? (task + 1) * step : plan.units;
    const T* row = row_of(task * step);
    for (int64_t number = task * step; number < last; ++number) {
      const T* next = number + 1 < last ? row_of(number + 1) : row;
      if (p.columns <= kShortRow && next != row) bring_closer(next, p.columns);
      choose<T>(p, plan, number, row, s);
      row = next;
    }
  });
}

}  // namespace

int64_t topk_workspace(const TopkParams& p, const Parallel& parallel) {
  const Plan plan = plan_of(p, parallel);
  Slices memory(nullptr);
  if (plan.chunk_room > 0) take_split(memory, plan);
  return parallel.threads * scratch_bytes(plan) + memory.bytes();
}

void topk(const TopkParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() { choose_all<T>(p, parallel); });
}

}  // namespace tokred::TOKRED_ISA
