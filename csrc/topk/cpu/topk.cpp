// topk, exact, by threshold search. A long row is read once where a threshold guessed from a sample
// holds: the entries above it are packed sixteen at a time, then the few of them are cut to k or
// sorted. A short row is searched near the threshold of the row before, or in the cache. Long rows
// are split into chunks among threads where rows are few.
//
// [8, 131072] in fp32: 4.2 MB, 0.1 ms at 40 GB/s; packing is 20 operations a vector of sixteen,
// which keeps two cores busy for about as long, and sorting 2048 entries takes half of it again.
// [18432, 289]: 21 MB, 1 ms; searching takes four times that on one core. In rows that resemble
// each other packing is 33 instructions a vector, half of all that a row takes.
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "topk/cpu/threshold_predictor.h"
#include "topk/params.h"

namespace tokred::TOKRED_ISA {
namespace {

// The sizes of a call.
struct Sizes {
  int64_t segments;  // of all rows
  int64_t width;  // columns of the widest segment
  int64_t max_chosen;
  int64_t max_found;  // capacity for candidates
  int64_t max_forced;  // capacity for forced entries
  bool sorts;  // entries are needed in order of their scores
  bool packs;  // candidates are packed into a buffer first, without those to keep
  int64_t chunks;  // of a segment
  int64_t chunk_found;  // capacity for a chunk's candidates where rows are chunked, else 0
};

constexpr int64_t kChunk = 16384;  // columns

Sizes sizes_of(const TopkParams& p, const Parallel& parallel) {
  Sizes sizes{};
  sizes.segments = p.rows * p.segments;
  sizes.width = p.block_size > 0 && p.block_size < p.columns ? p.block_size : p.columns;
  sizes.max_chosen = p.k < sizes.width ? p.k : sizes.width;
  sizes.max_found = found_capacity(sizes.max_chosen, sizes.width);
  const int64_t ends =
      p.num_sinks < sizes.width - p.num_locals ? p.num_sinks + p.num_locals : sizes.width;
  sizes.max_forced = p.must_keep.data ? sizes.width : ends;
  sizes.sorts = p.order == RowOrder::score || p.has_top_p;
  sizes.packs = p.must_keep.data;
  sizes.chunks = divide_up(sizes.width, kChunk);
  const bool splits = !sizes.packs && sizes.chunks > 1 && sizes.segments < parallel.threads;
  if (splits) sizes.chunk_found = sizes.max_found < kChunk ? sizes.max_found : kChunk;
  return sizes;
}

// One worker's memory.
struct Scratch {
  float* packed;  // [width] scores of candidates as fp32, NaN elsewhere
  float* sample;  // [kSample]
  uint64_t* keys;  // [2][max_found] of a sort
  Entries forced, found;
  float find_hint,
      keep_hint;  // thresholds of the row before: of its search, and of its best
  ThresholdPredictor predictor;
};

Entries allocate_entries(Workspace& memory, int64_t capacity) {
  auto* value = memory.allocate<float>(capacity + kLanes);
  return {value, memory.allocate<int32_t>(capacity + kLanes), 0, -kInfinity<float>};
}
Scratch allocate_scratch(Workspace& memory, const Sizes& sizes) {
  Scratch s{};
  s.find_hint = s.keep_hint = kInfinity<float>;
  if (sizes.packs) s.packed = memory.allocate<float>(sizes.width + kLanes);
  if (sizes.width > kShortRow) s.sample = memory.allocate<float>(kSample);
  if (sizes.sorts) s.keys = memory.allocate<uint64_t>(2 * sizes.max_found);
  s.forced = allocate_entries(memory, sizes.max_forced);
  s.found = allocate_entries(memory, sizes.max_found);
  return s;
}
int64_t scratch_bytes(const Sizes& sizes) {
  return workspace_bytes([&](Workspace& memory) { allocate_scratch(memory, sizes); });
}
Scratch scratch_of(const TopkParams& p, const Sizes& sizes, int64_t worker) {
  Workspace memory(static_cast<char*>(p.workspace) + worker * scratch_bytes(sizes));
  return allocate_scratch(memory, sizes);
}

// One segment of a row. Its entries are forced up to `first` and from `last` on.
struct Segment {
  int64_t row, begin, first, last, end;
  int64_t wanted;
};

Segment segment_of(const TopkParams& p, const Sizes& sizes, int64_t number) {
  const auto between = [](int64_t low, int64_t x, int64_t high) {
    return x < low ? low : x > high ? high : x;
  };
  Segment segment;
  segment.row = p.segments > 1 ? number / p.segments : number;
  const int64_t length = row_number(p.lengths, segment.row, p.columns);
  segment.begin = between(0, (number - segment.row * p.segments) * sizes.width, length);
  segment.end = between(segment.begin, segment.begin + sizes.width, length);
  segment.first = between(segment.begin, p.num_sinks, segment.end);
  segment.last = between(segment.first, length - p.num_locals, segment.end);
  segment.wanted = row_number(p.row_k, segment.row, sizes.max_chosen);
  return segment;
}

float floor_of(const TopkParams& p) { return p.has_threshold ? p.threshold : -kInfinity<float>; }

// The score of a forced entry, as it is ranked.
TOKRED_INLINE f32x16 ranked(f32x16 v) { return max(v, splat(-kInfinity<float>)) + splat(0.0f); }

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
    pack_lanes(forced.index + forced.count, load(kLaneNumbers) + splat(static_cast<int32_t>(i)),
               mask);
    forced.count += bit_count(mask);
    for (uint32_t rest = mask; rest; rest &= rest - 1) to[__builtin_ctz(rest)] = kNaN;
  }
}

// Tries a prediction or a guess, for short rows the threshold of the row before, then searches.
template <class T>
void find(const Candidates<T>& c, int64_t capacity, Scratch& s) {
  if (c.wanted <= 0) return;
  const bool is_short = c.n <= kShortRow;
  const bool predicts = is_short && !s.keys && s.predictor.ready();
  if (predicts && find_predicted(c, capacity, s.predictor, s.found)) return;
  const float guess = is_short ? s.find_hint : guess_threshold(c, s.sample);
  if (guess >= c.floor && find_above(c, guess, capacity, s.found)) return;
  find_by_search(c, capacity, s.found);
  if (is_short) s.find_hint = s.found.below;
}

// The number of sorted entries whose probabilities exceed top_p, at least min_k.
int64_t count_to_top_p(const TopkParams& p, const float* value, int64_t count) {
  constexpr double kMaxProbability = 1 << 20;
  constexpr double kOne = static_cast<double>(int64_t{1} << kProbabilityBits);
  const double share = p.top_p < kMaxProbability ? p.top_p : kMaxProbability;
  const int64_t limit = share < 0 ? -1 : static_cast<int64_t>(share * kOne);
  int64_t total = 0, within = 0;
  for (; within < count; ++within) {
    const double probability = value[within] > 0 ? value[within] : 0.0;
    total += static_cast<int64_t>((probability < kMaxProbability ? probability : kMaxProbability) *
                                  kOne);
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

// Writes the chosen entries, in order, to the segment's row of the outputs.
void write(const TopkParams& p, int64_t number, int64_t wanted, Scratch& s) {
  float* value = p.values + number * p.k;
  int32_t* index = p.indices + number * p.k;
  keep_best_forced(s.forced, wanted);
  const int64_t rest = wanted - s.forced.count;
  int64_t count = s.forced.count + (s.found.count < rest ? s.found.count : rest);
  if (const int64_t excess = s.found.count - rest; excess > (s.keys ? rest / 8 : 0)) {
    keep_best(s.found, rest, s.keep_hint);
    s.predictor.learn(s.keep_hint, s.found.below, excess);
  }
  if (!s.keys) {
    merge_by_position(s.forced, s.found, value, index);
  } else if (count > 0) {
    const int64_t forced = s.forced.count;
    sort_by_score(s.forced, forced, s.keys, value, index);
    sort_by_score(s.found, count - forced, s.keys, value + forced, index + forced);
    if (p.has_top_p) count = count_to_top_p(p, value, count);
    if (p.order == RowOrder::position) sort_by_position(value, index, count, s.keys);
  }
  for (int64_t i = count; i < p.k; ++i) value[i] = -kInfinity<float>;
  for (int64_t i = count; i < p.k; ++i) index[i] = -1;
  p.counts[number] = static_cast<int32_t>(count);
}

// x: the row of the segment.
template <class T>
void choose(const TopkParams& p, const Sizes& sizes, int64_t number, const T* x, Scratch& s) {
  const Segment segment = segment_of(p, sizes, number);
  s.forced.count = s.found.count = 0;
  if (segment.wanted == 0) return write(p, number, 0, s);
  append_all(x, segment.begin, segment.first, s.forced);
  if (sizes.packs) {
    pack_candidates(x, row_start<uint8_t>(p.must_keep, segment.row), segment.first, segment.last,
                    s.packed, s.forced);
  }
  append_all(x, segment.last, segment.end, s.forced);
  const int64_t count = segment.last - segment.first, wanted = segment.wanted - s.forced.count;
  if (sizes.packs) {
    find(Candidates<float>{s.packed, count, segment.first, floor_of(p), wanted}, sizes.max_found,
         s);
  } else {
    find(Candidates<T>{x + segment.first, count, segment.first, floor_of(p), wanted},
         sizes.max_found, s);
  }
  write(p, number, segment.wanted, s);
}

// The candidates of every chunk, where long rows are fewer than the threads.
struct ChunkedRows {
  float* guess;  // [segments]
  int64_t* count;  // [segments * chunks], -1 where there were too many
  float* value;  // [segments * chunks][chunk_found + kLanes]
  int32_t* index;  // [segments * chunks][chunk_found + kLanes]
};

ChunkedRows allocate_chunks(Workspace& memory, const Sizes& sizes) {
  const int64_t chunks = sizes.segments * sizes.chunks, room = sizes.chunk_found + kLanes;
  ChunkedRows chunked;
  chunked.guess = memory.allocate<float>(sizes.segments);
  chunked.count = memory.allocate<int64_t>(chunks);
  chunked.value = memory.allocate<float>(chunks * room);
  chunked.index = memory.allocate<int32_t>(chunks * room);
  return chunked;
}

// Joins the chunks of a segment; false where one is missing or they are too many.
bool join(const Sizes& sizes, const ChunkedRows& chunked, int64_t number, Entries& found) {
  const int64_t room = sizes.chunk_found + kLanes;
  for (int64_t i = number * sizes.chunks; i < (number + 1) * sizes.chunks; ++i) {
    const int64_t count = chunked.count[i];
    if (count < 0 || found.count + count > sizes.max_found) return false;
    copy_bytes(found.value + found.count, chunked.value + i * room, 4 * count);
    copy_bytes(found.index + found.count, chunked.index + i * room, 4 * count);
    found.count += count;
  }
  return true;
}

template <class T>
void choose_split(const TopkParams& p, const Sizes& sizes, const Parallel& parallel) {
  Workspace memory(static_cast<char*>(p.workspace) + parallel.threads * scratch_bytes(sizes));
  const ChunkedRows chunked = allocate_chunks(memory, sizes);
  const auto candidates = [&](int64_t number) {
    const Segment segment = segment_of(p, sizes, number);
    const int64_t forced = segment.first - segment.begin + segment.end - segment.last;
    return Candidates<T>{row_start<T>(p.scores, segment.row) + segment.first,
                         segment.last - segment.first, segment.first, floor_of(p),
                         segment.wanted - forced};
  };
  parallel_tasks(parallel, sizes.segments, [&](int64_t number, int64_t worker) {
    chunked.guess[number] =
        guess_threshold(candidates(number), scratch_of(p, sizes, worker).sample);
  });
  parallel_tasks(parallel, sizes.segments * sizes.chunks, [&](int64_t task, int64_t) {
    const Candidates<T> c = candidates(task / sizes.chunks);
    const int64_t start = task % sizes.chunks * kChunk, rest = c.n - start;
    const int64_t capacity = sizes.chunk_found, room = capacity + kLanes;
    Entries entries{chunked.value + task * room, chunked.index + task * room, 0, -kInfinity<float>};
    const Threshold guess{chunked.guess[task / sizes.chunks], 0};
    const bool fits = rest <= 0 || append(c.x + start, rest < kChunk ? rest : kChunk,
                                          c.first + start, guess, capacity, entries);
    chunked.count[task] = fits ? entries.count : -1;
  });
  parallel_tasks(parallel, sizes.segments, [&](int64_t number, int64_t worker) {
    const Segment segment = segment_of(p, sizes, number);
    const Candidates<T> c = candidates(number);
    Scratch s = scratch_of(p, sizes, worker);
    const T* x = row_start<T>(p.scores, segment.row);
    append_all(x, segment.begin, segment.first, s.forced);
    append_all(x, segment.last, segment.end, s.forced);
    s.found.below = chunked.guess[number];
    const bool complete = c.wanted > 0 && join(sizes, chunked, number, s.found);
    const bool enough = s.found.count >= c.wanted || s.found.below == c.floor;
    if (c.wanted > 0 && !(complete && enough)) find_by_search(c, sizes.max_found, s.found);
    write(p, number, segment.wanted, s);
  });
}

// Prefetches the next short row while this one is searched.
template <class T>
void prefetch_row(const T* row, int64_t columns) {
  for (int64_t i = 0; i < columns; i += 64 / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(row + i);
  }
}

template <class T>
void choose_all(const TopkParams& p, const Parallel& parallel) {
  const Sizes sizes = sizes_of(p, parallel);
  if (sizes.chunk_found > 0) return choose_split<T>(p, sizes, parallel);
  const int64_t step = rows_per_task(sizes.width);
  const auto row_of = [&](int64_t number) {
    return row_start<T>(p.scores, p.segments > 1 ? number / p.segments : number);
  };
  parallel_tasks(parallel, divide_up(sizes.segments, step), [&](int64_t task, int64_t worker) {
    Scratch s = scratch_of(p, sizes, worker);
    const int64_t last = (task + 1) * step < sizes.segments ? (task + 1) * step : sizes.segments;
    const T* row = row_of(task * step);
    for (int64_t number = task * step; number < last; ++number) {
      const T* next = number + 1 < last ? row_of(number + 1) : row;
      if (p.columns <= kShortRow && next != row) prefetch_row(next, p.columns);
      choose<T>(p, sizes, number, row, s);
      row = next;
    }
  });
}

}  // namespace

int64_t topk_workspace(const TopkParams& p, const Parallel& parallel) {
  const Sizes sizes = sizes_of(p, parallel);
  return parallel.threads * scratch_bytes(sizes) + workspace_bytes([&](Workspace& memory) {
           if (sizes.chunk_found > 0) allocate_chunks(memory, sizes);
         });
}

void topk(const TopkParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() { choose_all<T>(p, parallel); });
}

}  // namespace tokred::TOKRED_ISA
