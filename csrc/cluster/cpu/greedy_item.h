// greedy_select: the working arrays of an item of the batch, and its tokens as panels with their
// scores as first picks.
#pragma once

#include "cluster/cpu/panels.h"
#include "cluster/params.h"
#include "common/cpu/items.h"
#include "common/cpu/parallel.h"
#include "common/cpu/workspace.h"

namespace tokred::TOKRED_ISA {

inline constexpr float kNone = -__builtin_inff();
// Candidates whose gains are summed together.
inline constexpr int64_t kCandidates = kTileRows<float>;
// An item of so many numbers has work for all threads.
inline constexpr int64_t kWideWork = 1 << 18;
// Tiles of a thread that are updated before the next look for the best.
inline constexpr int64_t kWave = 8;
// Tiles that one pass over all others compares with them.
inline constexpr int64_t kComparedTiles = 4;
// Numbers of the tokens that a cache holds. Where there are more, one pass measures the distances
// to kAhead tokens.
inline constexpr int64_t kCacheNumbers = 1 << 18, kAhead = 12;
inline constexpr int64_t kColumns = 64;  // columns of distances that are kept
inline constexpr int64_t kSketch = 64;  // channels of a sketch

// The working arrays of an item. The score of a token is gain * value + add; add is -inf where it
// is picked or does not take part. value: the minimum distance to a picked token (l2: its square),
// the sum of the distances, or, for facility, the maximum similarity with a picked token.
struct GreedyItem {
  int64_t number, tiles, count;  // count: tokens picked so far
  float *panels, *offset, *squared, *gain, *add, *value;  // f32 [tiles][16]; panels [.. C ..]
  float* bound;  // f32 [tiles], facility [tiles][16]: the best score at an earlier count
  int32_t* best;  // i32 [tiles]: the token that had it
  int32_t* seen;  // i32, shaped as bound: the count at which it was the score
  bool* rises;  // bool [tiles]: scores may rise
  bool any_rises;
  float* nearest;  // f32 [tiles][16]: the minimum distance found so far to another token
  float* apart;  // f32 [threads][kComparedTiles][16][16]: of a row to the tokens of each lane
  bool* done;  // bool [tiles]: whether a tile has been compared with all others
  float* sketch;  // f32 [tiles][kSketch][16], or null
  float* few;  // f32 [C][16]: tokens to be compared with all others
  bool* compared;  // bool [tiles][16]: whether a token has been
  int64_t ahead, num_columns, next_column;
  float* columns;  // f32 [num_columns][tiles][16]: distances of all tokens to some (maxsum), or
                   // similarities with them (facility)
  int32_t* column_of;  // i32 [tiles][16]: a token's column, -1 where it has none
  int32_t* owner;  // i32 [num_columns]
  float *chosen, *chosen_offset;  // the picked tokens as rows, or candidates of each thread
  int32_t* wave;  // i32 [kWave * threads]: tiles or tokens that are updated next
};

inline ItemThreads item_threads(const GreedySelectParams& p, const Parallel& parallel) {
  return ItemThreads(parallel, p.batch, p.x.tokens * p.channels >= kWideWork);
}

inline GreedyItem carve(const GreedySelectParams& p, int64_t threads, Workspace& workspace) {
  const bool is_facility = p.rule == GreedyRule::facility;
  GreedyItem s{};
  s.tiles = divide_up(p.x.tokens, kLanes);
  const int64_t lanes = s.tiles * kLanes, wave = kWave * kCandidates * threads;
  const int64_t bounds = is_facility ? lanes : round_up(s.tiles, kLanes);
  const bool is_sum = p.rule == GreedyRule::maxsum;
  const int64_t rows = is_facility ? max(1, kCandidates * threads)
                       : is_sum    ? kAhead
                                   : min(p.k, p.x.tokens);
  s.panels = workspace.allocate<float>(lanes * p.channels);
  for (float** array : {&s.offset, &s.squared, &s.gain, &s.add, &s.value}) {
    *array = workspace.allocate<float>(lanes);
  }
  s.bound = workspace.allocate<float>(bounds);
  s.best = workspace.allocate<int32_t>(bounds);
  s.seen = workspace.allocate<int32_t>(bounds);
  s.rises = workspace.allocate<bool>(s.tiles);
  if (p.first == FirstPick::isolated) {
    s.nearest = workspace.allocate<float>(lanes);
    s.apart = workspace.allocate<float>(threads * kComparedTiles * kLanes * kLanes);
    s.done = workspace.allocate<bool>(s.tiles);
    const bool pays = p.channels >= 4 * kSketch && s.tiles > kComparedTiles;
    if (pays && p.metric == Metric::cosine) {
      s.sketch = workspace.allocate<float>(lanes * kSketch);
      s.few = workspace.allocate<float>(p.channels * kLanes);
      s.compared = workspace.allocate<bool>(lanes);
    }
  }
  if (is_sum || is_facility) {
    const bool is_large = lanes * p.channels > kCacheNumbers;
    s.ahead = is_large ? kAhead : 1;
    s.num_columns = is_facility ? kColumns + kCandidates * threads : is_large ? kColumns : 1;
    s.columns = workspace.allocate<float>(s.num_columns * lanes);
    s.column_of = workspace.allocate<int32_t>(lanes);
    s.owner = workspace.allocate<int32_t>(s.num_columns);
  }
  s.chosen = workspace.allocate<float>(rows * p.channels);
  s.chosen_offset = workspace.allocate<float>(rows);
  s.wave = workspace.allocate<int32_t>(wave);
  return s;
}

inline float* panel_of(const GreedySelectParams& p, const GreedyItem& s, int64_t tile) {
  return s.panels + tile * p.channels * kLanes;
}
inline bool takes_part(const GreedyItem& s, int64_t token) {
  return s.squared[token] == s.squared[token];
}
inline float weight_of(const GreedySelectParams& p, const GreedyItem& s, int64_t token) {
  return p.x.weight && token < p.x.tokens
             ? p.x.weight[s.number * p.x.weight_stride_batch + token * p.x.weight_stride_token]
             : 1.0f;
}

inline void note_best(const GreedyItem& s, int64_t tile, const float* score) {
  const int64_t first = first_max(score, kLanes);
  s.bound[tile] = first < 0 ? kNone : score[first];
  s.best[tile] = static_cast<int32_t>(first < 0 ? -1 : tile * kLanes + first);
}
inline void note_best(const GreedyItem& s, int64_t tile, f32x16 score) {
  alignas(64) float lane[kLanes];
  store(lane, score);
  note_best(s, tile, lane);
}

// Channel c counts in channel c % kSketch, with a sign: products of sketches are on average those
// of the tokens.
inline void sketch_tile(const GreedySelectParams& p, const GreedyItem& s, int64_t tile) {
  const float* panel = panel_of(p, s, tile);
  float* sketch = s.sketch + tile * kSketch * kLanes;
  for (int64_t i = 0; i < kSketch * kLanes; ++i) sketch[i] = 0;
  for (int64_t c = 0; c < p.channels; ++c) {
    const bool negative = static_cast<uint32_t>(c) * 0x9e3779b9u >> 31;
    float* to = sketch + c % kSketch * kLanes;
    store(to, fma(splat(negative ? -1.0f : 1.0f), load(panel + c * kLanes), load(to)));
  }
}

// Packs a tile, and scores its tokens as first picks.
template <class T>
inline void prepare_tile(const GreedySelectParams& p, const GreedyItem& s, int64_t tile) {
  const int64_t token0 = tile * kLanes;
  pack_panel<T>(p.x, s.number, token0, p.channels, p.metric, panel_of(p, s, tile),
                s.offset + token0, s.squared + token0);
  if (s.sketch) sketch_tile(p, s, tile);
  float first[kLanes];
  s.rises[tile] = p.rule == GreedyRule::maxsum;
  for (int64_t token = token0; token < token0 + kLanes; ++token) {
    const float weight = weight_of(p, s, token);
    const bool here = takes_part(s, token), is_mmr = p.rule == GreedyRule::mmr;
    s.gain[token] = is_mmr ? 1.0f - p.trade_off : weight;
    s.add[token] = !here ? kNone : is_mmr ? p.trade_off * weight : 0.0f;
    const bool from_zero = p.rule == GreedyRule::maxsum || p.rule == GreedyRule::facility;
    s.value[token] = from_zero && here ? 0.0f : -kNone;
    s.rises[tile] |= here && s.gain[token] < 0;
    first[token - token0] = !here ? kNone : p.first == FirstPick::norm ? s.squared[token] : weight;
  }
  note_best(s, tile, first);
}

// l2: its square.
TOKRED_INLINE f32x16 distance(const GreedySelectParams& p, f32x16 dot, f32x16 offsets) {
  const f32x16 apart = fma(splat(distance_scale(p.metric)), dot, offsets);
  return p.metric == Metric::dot ? apart : max(apart, splat(0.0f));
}

}  // namespace tokred::TOKRED_ISA
