// match: the row arg-max of a similarity matrix that is never stored, by register tiles of A B^T.
// Sixteen source rows are the lanes of a vector and destination rows are broadcast, so a row's best
// score and index stay in their lane, sums run over the channels in order, and results do not
// depend on blocking or threads.
//
// [64, 577, 64] in halves: 0.68 GFLOP over 9.5 MB, so the floor is the fp32 FMA rate: 3.4 ms at
// 200 GFLOP/s. Converting and packing touch each element once per block of rows (< 5 %).
#include "common/cpu/lanes.h"
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "common/cpu/workspace.h"
#include "match/cpu/norms.h"
#include "match/cpu/token_set.h"

namespace tokred::TOKRED_ISA {
namespace {

// Register tile: kTokens destinations by kPanels * 16 source rows.
#if defined(__AVX512F__)
constexpr int kTokens = 12, kPanels = 2;
#elif defined(__AVX2__)
constexpr int kTokens = 6, kPanels = 1;
#else
constexpr int kTokens = 2, kPanels = 1;
#endif
constexpr int kChunk = 48;  // destinations transposed at a time
constexpr int kRowStep = kPanels * kLanes;  // source rows of a tile
static_assert(kChunk % kTokens == 0);

// Of every usable destination row, in row order: s = dot * scale + offset, then times weight.
struct Columns {
  int32_t* row;  // [Nb] row number in b
  float* scale;  // [Nb]
  float* offset;  // [Nb]
  float* weight;  // [Nb]
  int32_t* count;  // [1]
};

// One worker's memory.
struct Scratch {
  float* panels;  // [block / 16][C][16] source rows, transposed
  float* tokens;  // [C][kChunk] destinations, transposed
  float* best;  // [block]; with k > 1 the last of the k best
  int32_t* index;  // [block]
  float* offset;  // [block] row term of l2
  float* weight;  // [block]
};

int64_t block_rows(const MatchParams& p, const Parallel& parallel) {
  // The packed rows should stay in half of a 512 KiB L2 (C = 256: 256 rows of 1 KiB); fewer where
  // there would be less than four tasks a thread.
  const int64_t fit = (int64_t{1} << 16) / (p.channels > 0 ? p.channels : 1);
  int64_t rows = fit < 96 ? 96 : fit > 384 ? 384 : fit;
  while (rows > 96 && p.batch * ((p.a.count + rows - 1) / rows) < 4 * parallel.threads) rows /= 2;
  return round_up(rows, kRowStep);
}

Columns allocate_columns(Workspace& memory, const MatchParams& p) {
  Columns columns;
  columns.row = memory.allocate<int32_t>(p.b.count);
  columns.scale = memory.allocate<float>(p.b.count);
  columns.offset = memory.allocate<float>(p.b.count);
  columns.weight = memory.allocate<float>(p.b.count);
  columns.count = memory.allocate<int32_t>(1);
  return columns;
}
Scratch allocate_scratch(Workspace& memory, const MatchParams& p, int64_t block) {
  Scratch s;
  s.panels = memory.allocate<float>(block * p.channels);
  s.tokens = memory.allocate<float>(kChunk * p.channels);
  s.best = memory.allocate<float>(block);
  s.index = memory.allocate<int32_t>(block);
  s.offset = memory.allocate<float>(block);
  s.weight = memory.allocate<float>(block);
  return s;
}
int64_t columns_bytes(const MatchParams& p) {
  return workspace_bytes([&](Workspace& memory) { allocate_columns(memory, p); });
}
int64_t scratch_bytes(const MatchParams& p, int64_t block) {
  return workspace_bytes([&](Workspace& memory) { allocate_scratch(memory, p, block); });
}

// The columns of every batch item, then the scratch of every worker.
Columns columns_of(const MatchParams& p, int64_t item) {
  Workspace memory(static_cast<char*>(p.workspace) + item * columns_bytes(p));
  return allocate_columns(memory, p);
}
Scratch scratch_of(const MatchParams& p, int64_t block, int64_t worker) {
  Workspace memory(static_cast<char*>(p.workspace) + p.batch * columns_bytes(p) +
                   worker * scratch_bytes(p, block));
  return allocate_scratch(memory, p, block);
}

template <class T>
TOKRED_INLINE const T* row_data(const TokenSet& set, int64_t item, int64_t position) {
  return static_cast<const T*>(set.data) + item * set.stride_batch + position * set.stride_token;
}
TOKRED_INLINE float row_weight(const TokenSet& set, int64_t item, int64_t position) {
  return set.weight
             ? set.weight[item * set.weight_stride_batch + position * set.weight_stride_token]
             : 1.0f;
}

// Turns the dot products of sixteen destinations, the first of which is `column`, into scores.
template <class T>
TOKRED_INLINE void prepare_sixteen(const MatchParams& p, int64_t item, const Columns& columns,
                                   int64_t column, int64_t count) {
  const T* rows[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    rows[lane] = lane < count
                     ? row_data<T>(p.b, item, row_position(p.b, item, columns.row[column + lane]))
                     : nullptr;
  }
  const f32x16 squared = squared_norms(rows, p.channels);
  f32x16 scale = splat(2.0f), offset = splat(0.0f) - squared;
  if (p.metric != Metric::l2) {
    const bool half = p.metric == Metric::half_cosine;
    scale = splat(half ? 0.5f : 1.0f) * inverse_norm(squared);
    offset = splat(half ? 0.5f : 0.0f);
  }
  store_row(columns.scale + column, scale, count);
  store_row(columns.offset + column, offset, count);
}

// Lists the usable destinations of one item, with the terms that make scores of dot products.
template <class T>
void prepare_columns(const MatchParams& p, int64_t item) {
  const Columns columns = columns_of(p, item);
  int32_t count = 0;
  for (int64_t t = 0; t < p.b.count; ++t) {
    const int64_t position = row_position(p.b, item, t);
    if (position < 0 || row_masked(p.b, item, position)) continue;
    columns.row[count] = static_cast<int32_t>(t);
    columns.scale[count] = 1.0f;
    columns.offset[count] = 0.0f;
    columns.weight[count] = row_weight(p.b, item, position);
    ++count;
  }
  *columns.count = count;
  for (int64_t column = 0; p.metric != Metric::dot && column < count; column += kLanes) {
    prepare_sixteen<T>(p, item, columns, column, min(kLanes, count - column));
  }
}

// Packs the source rows [row0, row0 + 16) as the lanes of [C][16], scaled; rows that point nowhere
// become zeros.
template <class T>
void pack_panel(const MatchParams& p, int64_t item, int64_t row0, int64_t i0, const Scratch& s) {
  constexpr int64_t kChannels = 64;  // transposed at a time
  const T* rows[kLanes];
  alignas(64) float scale[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t i = i0 + lane, t = row0 + i;
    const int64_t position = t < p.a.count ? row_position(p.a, item, t) : -1;
    rows[lane] = position < 0 ? nullptr : row_data<T>(p.a, item, position);
    s.weight[i] = position < 0 ? 1.0f : row_weight(p.a, item, position);
  }
  store(s.best + i0, splat(-kInfinity<float>));
  store(s.index + i0, splat(-1));
  store(s.offset + i0, splat(0.0f));
  store(scale, splat(1.0f));
  if (p.metric != Metric::dot) {
    const f32x16 squared = squared_norms(rows, p.channels);
    if (p.metric == Metric::l2) {
      store(s.offset + i0, splat(0.0f) - squared);
    } else {
      store(scale, inverse_norm(squared));
    }
  }
  for (int64_t c = 0; c < p.channels; c += kChannels) {
    const int64_t channels = min(p.channels - c, kChannels);
    alignas(64) float chunk[kLanes * kChannels];
    for (int lane = 0; lane < kLanes; ++lane) {
      float* to = chunk + lane * channels;
      if (rows[lane]) {
        pack_scaled(rows[lane] + c, channels, scale[lane], to);
      } else {
        fill_zero(to, channels * static_cast<int64_t>(sizeof(float)));
      }
    }
    transpose(chunk, kLanes, channels, s.panels + i0 * p.channels + c * kLanes);
  }
}

// Packs destinations as [C][kChunk], those of rows j0 .. of `columns`; behind the last one it comes
// again. Broadcast from there, the numbers of a tile need one address instead of one each.
template <class T>
void pack_tokens(const MatchParams& p, int64_t item, const Columns& columns, int64_t j0,
                 int64_t count, float* tokens) {
  constexpr int64_t kChannels = 64;  // transposed at a time
  const T* rows[kChunk];
  for (int64_t t = 0; t < kChunk; ++t) {
    const int64_t row = columns.row[j0 + min(t, count - 1)];
    rows[t] = row_data<T>(p.b, item, row_position(p.b, item, row));
  }
  for (int64_t c = 0; c < p.channels; c += kChannels) {
    const int64_t channels = min(p.channels - c, kChannels);
    alignas(64) float chunk[kChunk * kChannels];
    for (int64_t t = 0; t < kChunk; ++t) pack_row(rows[t] + c, channels, chunk + t * channels);
    transpose(chunk, kChunk, channels, tokens + c * kChunk);
  }
}

// emit(token, panel, products) for the destinations of a tile of kCount panels. The sums do not
// leave this function as an array: GCC would keep twenty-four registers of them in memory.
template <int kCount, class Emit>
TOKRED_INLINE void dot_tile(const float* panels, const float* tokens, int64_t channels,
                            const Emit& emit) {
  f32x16 dot[kTokens][kCount];
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
    for (int n = 0; n < kCount; ++n) dot[t][n] = splat(0.0f);
  }
  for (int64_t c = 0; c < channels; ++c) {
    f32x16 source[kCount];
#pragma GCC unroll 2
    for (int n = 0; n < kCount; ++n) source[n] = load(panels + n * kLanes * channels + c * kLanes);
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
      const f32x16 token = splat(tokens[c * kChunk + t]);
#pragma GCC unroll 2
      for (int n = 0; n < kCount; ++n) dot[t][n] = fma(token, source[n], dot[t][n]);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
    for (int n = 0; n < kCount; ++n) emit(t, n, dot[t][n]);
  }
}

// Lanes whose row number is more than `band` away from column `row` lose.
TOKRED_INLINE f32x16 inside_band(f32x16 score, int64_t row0, int64_t row, int64_t band) {
  float lane[kLanes];
  store(lane, score);
  for (int i = 0; i < kLanes; ++i) {
    const int64_t distance = row0 + i - row;
    if (distance > band || distance < -band) lane[i] = -__builtin_inff();
  }
  return load(lane);
}

// The k best partners of a row, in their place among the results.
struct BestList {
  float* score;  // [k]
  int32_t* index;  // [k]
  int64_t k;

  BestList(const MatchParams& p, int64_t item, int64_t row)
      : score(p.score + (item * p.a.count + row) * p.k),
        index(p.index + (item * p.a.count + row) * p.k), k(p.k) {}

  void clear() {
    for (int64_t i = 0; i < k; ++i) score[i] = -__builtin_inff();
    for (int64_t i = 0; i < k; ++i) index[i] = -1;
  }
  // Rows come in ascending order, so that a new one ranks behind its equals. Returns the k-th
  // score. + 0 makes -0 into +0, which compare equal.
  float insert(float s, int32_t row) {
    int64_t at = k - 1;
    for (; at > 0 && s > score[at - 1]; --at) {
      score[at] = score[at - 1];
      index[at] = index[at - 1];
    }
    score[at] = s + 0.0f;
    index[at] = row;
    return score[k - 1];
  }
};

// Puts a destination's scores for sixteen source rows into the lists of those that want it.
TOKRED_INLINE void insert_scores(const MatchParams& p, const Scratch& s, int64_t item,
                                 int64_t block_row0, int64_t i0, f32x16 score, int32_t row) {
  uint32_t lanes = greater_lanes(score, load(s.best + i0));
  if (!lanes) return;
  float lane[kLanes];
  store(lane, score);
  for (; lanes; lanes &= lanes - 1) {
    const int64_t i = i0 + __builtin_ctz(lanes);
    if (block_row0 + i >= p.a.count) return;
    s.best[i] = BestList(p, item, block_row0 + i).insert(lane[i - i0], row);
  }
}

// Passes one chunk of destinations by kCount panels of source rows.
template <int kCount, bool kGeneral, bool kMany>
TOKRED_INLINE void update_best(const MatchParams& p, const Scratch& s, int64_t item,
                               int64_t block_row0, int64_t i0, const Columns& columns,
                               int64_t column0, int64_t count) {
  f32x16 best[kCount];
  i32x16 index[kCount];
#pragma GCC unroll 2
  for (int n = 0; n < kCount; ++n) {
    best[n] = load(s.best + i0 + n * kLanes);
    index[n] = load(s.index + i0 + n * kLanes);
  }
  for (int64_t t0 = 0; t0 < count; t0 += kTokens) {
    const auto update = [&](int t, int n, f32x16 dot) {
      if (kMany && t0 + t >= count) return;
      // Past the end the last row comes again, which changes nothing.
      const int64_t j = column0 + (t0 + t < count ? t0 + t : count - 1);
      const int64_t i = i0 + n * kLanes;
      f32x16 score = fma(dot, splat(columns.scale[j]), splat(columns.offset[j]));
      if constexpr (kGeneral) {
        score = (score + load(s.offset + i)) * (load(s.weight + i) * splat(columns.weight[j]));
        if (p.band >= 0) score = inside_band(score, block_row0 + i, columns.row[j], p.band);
      }
      if constexpr (kMany) {
        insert_scores(p, s, item, block_row0, i, score, columns.row[j]);
      } else {
        index[n] = select_greater(score, best[n], splat(columns.row[j]), index[n]);
        best[n] = select_greater(score, best[n], score, best[n]);
      }
    };
    const float* panels = s.panels + i0 * p.channels;
    if constexpr (kGeneral) {
      alignas(64) float dot[kTokens * kCount * kLanes];
      dot_tile<kCount>(panels, s.tokens + t0, p.channels, [&](int t, int n, f32x16 sum) {
        store(dot + (t * kCount + n) * kLanes, sum);
      });
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
        for (int n = 0; n < kCount; ++n) update(t, n, load(dot + (t * kCount + n) * kLanes));
      }
    } else {
      dot_tile<kCount>(panels, s.tokens + t0, p.channels, update);
    }
  }
#pragma GCC unroll 2
  for (int n = 0; !kMany && n < kCount; ++n) {
    store(s.best + i0 + n * kLanes, best[n]);
    store(s.index + i0 + n * kLanes, index[n]);
  }
}

template <class T>
void match_block(const MatchParams& p, int64_t item, int64_t row0, int64_t block,
                 const Scratch& s) {
  const int64_t valid = p.a.count - row0 < block ? p.a.count - row0 : block;
  const int64_t rows_used = round_up(valid, kLanes);
  for (int64_t i = 0; i < rows_used; i += kLanes) pack_panel<T>(p, item, row0, i, s);
  const Columns columns = columns_of(p, item);
  const bool many = p.k > 1, general = p.band >= 0 || p.a.weight || p.b.weight;
  for (int64_t i = 0; many && i < valid; ++i) BestList(p, item, row0 + i).clear();
  for (int64_t j0 = 0; j0 < *columns.count; j0 += kChunk) {
    const int64_t count = *columns.count - j0 < kChunk ? *columns.count - j0 : kChunk;
    pack_tokens<T>(p, item, columns, j0, count, s.tokens);
    const auto update = [&]<int kCount>(int64_t i0) {
      if (many) {
        update_best<kCount, true, true>(p, s, item, row0, i0, columns, j0, count);
      } else if (general) {
        update_best<kCount, true, false>(p, s, item, row0, i0, columns, j0, count);
      } else {
        update_best<kCount, false, false>(p, s, item, row0, i0, columns, j0, count);
      }
    };
    int64_t i0 = 0;
    for (; i0 + kRowStep <= rows_used; i0 += kRowStep) update.template operator()<kPanels>(i0);
    if (i0 < rows_used) update.template operator()<1>(i0);
  }
  for (int64_t i = 0; i < valid; ++i) {
    const int64_t position = row_position(p.a, item, row0 + i);
    if (many) {
      if (position < 0 || row_masked(p.a, item, position)) BestList(p, item, row0 + i).clear();
      continue;
    }
    // The weighted score already holds the row term of l2, which may be infinite: no match then.
    const float score = general ? s.best[i] : s.best[i] + s.offset[i];
    const bool found = position >= 0 && !row_masked(p.a, item, position) && s.index[i] >= 0 &&
                       score > -__builtin_inff();
    const int64_t at = item * p.a.count + row0 + i;
    // + 0 makes -0 into +0, which compare equal and must rank equal.
    p.score[at] = found ? score + 0.0f : -__builtin_inff();
    p.index[at] = found ? s.index[i] : -1;
  }
}

template <class T>
void match_all(const MatchParams& p, const Parallel& parallel) {
  const int64_t block = block_rows(p, parallel);
  const int64_t blocks = (p.a.count + block - 1) / block;
  // Destinations of a single block are prepared with it, while they are in the cache.
  if (blocks != 1) {
    parallel_tasks(parallel, p.batch, [&](int64_t item, int64_t) { prepare_columns<T>(p, item); });
  }
  parallel_tasks(parallel, p.batch * blocks, [&](int64_t task, int64_t worker) {
    const int64_t item = task / blocks;
    if (blocks == 1) prepare_columns<T>(p, item);
    match_block<T>(p, item, task % blocks * block, block, scratch_of(p, block, worker));
  });
}

}  // namespace

int64_t match_workspace(const MatchParams& p, const Parallel& parallel) {
  return p.batch * columns_bytes(p) + parallel.threads * scratch_bytes(p, block_rows(p, parallel));
}

void match(const MatchParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() { match_all<T>(p, parallel); });
}

}  // namespace tokred::TOKRED_ISA
