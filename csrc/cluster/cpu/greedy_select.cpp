// greedy_select: lazy greedy (Minoux, 1978), exact. Scores only fall as tokens are picked, so the
// best score that a tile of sixteen tokens once had is a bound. The tile is compared with the
// tokens picked since then, many at a time in register tiles, only when that bound is the best of
// all. For facility, every token has a bound of its own.
//
// [16, 1024, 64], k = 256: all pairs of a token and a picked one are 0.54 GFLOP, 11 ms at 50
// GFLOP/s; a plain loop reads all tokens at every step, this one a twentieth of them. Sums of
// distances rise, and so may scores with negative weights: these are updated at every pick. Where
// the tokens are more than a cache holds, one pass over them measures the distances to a dozen
// tokens in the time of one: the token just picked and the most likely next picks. Of 64 picks of
// [1, 2880, 4096] twenty read all tokens.
//
// The most isolated token of [1, 2880, 4096]: 34 GFLOP for every pair once, 340 ms at 100 GFLOP/s.
// By cosine, sketches of 64 channels (Charikar, Chen and Farach-Colton's count sketch) first find
// four tokens that may be near each token; the distance to the nearest of the four, plus what
// rounding may add, bounds the distance to the nearest of all. Tiles whose bounds are below the
// best token found need no comparison: of clustered tokens that is nearly all of them.
#include "cluster/cpu/panels.h"
#include "cluster/params.h"
#include "common/cpu/items.h"
#include "common/cpu/panel_products.h"
#include "common/cpu/parallel.h"
#include "common/cpu/workspace.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr float kNone = -__builtin_inff();
constexpr int64_t kRowTiles = kRegisterBytes == 16 ? 2 : 4;  // tiles multiplied with a row at once
constexpr int64_t kCatchUp = 4 * kTileRows<float>;  // picked tokens that a tile is compared with
constexpr int64_t kCandidates = kTileRows<float>;  // whose gains are summed together
constexpr int64_t kWideWork = 1 << 18;  // an item of as many numbers has work for all threads
constexpr int64_t kWave =
    8;  // tiles of a thread that are updated before the next look for the best
constexpr int64_t kBlock = 64;  // tiles of a task that reads all of them
constexpr int64_t kComparedTiles = 4;  // tiles that one pass over all others compares with them
constexpr int64_t kRounds = 8;  // of sixteen tokens compared with all, before whole tiles are
constexpr int64_t kCacheNumbers = 1 << 18;  // numbers of the tokens that a cache holds
constexpr int64_t kAhead = 12;  // tokens that one pass measures distances to, where it does not
constexpr int64_t kColumns = 64;  // columns of distances that are kept
constexpr int64_t kPassTiles = 8;  // tiles of a task of such a pass
constexpr int64_t kSketch = 64;  // channels of a sketch
constexpr int64_t kGuesses = 4;  // possible neighbours of a token that sketches give

// The working arrays of an item. The score of a token is gain * value + add; add is -inf where it
// is picked or does not take part. value: the minimum distance to a picked token (l2: its square),
// the sum of the distances, or, for facility, the maximum similarity with a picked token.
struct Item {
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

ItemThreads item_threads(const GreedySelectParams& p, const Parallel& parallel) {
  return ItemThreads(parallel, p.batch, p.x.tokens * p.channels >= kWideWork);
}

Item carve(const GreedySelectParams& p, int64_t threads, Workspace& workspace) {
  const bool is_facility = p.rule == GreedyRule::facility;
  Item s{};
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

float* panel_of(const GreedySelectParams& p, const Item& s, int64_t tile) {
  return s.panels + tile * p.channels * kLanes;
}
bool takes_part(const Item& s, int64_t token) { return s.squared[token] == s.squared[token]; }
float weight_of(const GreedySelectParams& p, const Item& s, int64_t token) {
  return p.x.weight && token < p.x.tokens
             ? p.x.weight[s.number * p.x.weight_stride_batch + token * p.x.weight_stride_token]
             : 1.0f;
}

void note_best(const Item& s, int64_t tile, const float* score) {
  const int64_t first = first_max(score, kLanes);
  s.bound[tile] = first < 0 ? kNone : score[first];
  s.best[tile] = static_cast<int32_t>(first < 0 ? -1 : tile * kLanes + first);
}
void note_best(const Item& s, int64_t tile, f32x16 score) {
  alignas(64) float lane[kLanes];
  store(lane, score);
  note_best(s, tile, lane);
}

// Channel c counts in channel c % kSketch, with a sign: products of sketches are on average those
// of the tokens.
void sketch_tile(const GreedySelectParams& p, const Item& s, int64_t tile) {
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
void prepare_tile(const GreedySelectParams& p, const Item& s, int64_t tile) {
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

// Compares `count` tiles with all tiles that are not done, with each other and with themselves.
void compare_tiles(const GreedySelectParams& p, const Item& s, const int64_t* tiles, int64_t count,
                   const Parallel& parallel) {
  const int64_t pairs = count * kLanes * kLanes;
  for (int64_t i = 0; i < parallel.threads * pairs; ++i) s.apart[i] = -kNone;
  parallel_tasks(parallel, s.tiles, [&](int64_t other, int64_t worker) {
    if (s.done[other]) return;
    int64_t here = count;  // two of these tiles are compared once, the later with the earlier
    for (int64_t i = 0; i < count; ++i) here = tiles[i] == other ? i + 1 : here;
    alignas(64) float dots[kComparedTiles * kLanes * kLanes] = {};
    for (int64_t c = 0; c < p.channels; c += kProductChannels) {
      const int64_t channels = min(kProductChannels, p.channels - c);
      for (int64_t i = 0; i < here; ++i) {
        add_products(panel_of(p, s, tiles[i]) + c * kLanes, panel_of(p, s, other) + c * kLanes,
                     channels, dots + i * kLanes * kLanes);
      }
    }
    alignas(64) float hidden[kLanes], own[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      hidden[lane] = takes_part(s, other * kLanes + lane) ? 0.0f : -kNone;
    }
    float* nearest = s.nearest + other * kLanes;
    const f32x16 offset = load(s.offset + other * kLanes), hide = load(hidden);
    for (int64_t i = 0; i < here * kLanes; ++i) {
      const int64_t row = i % kLanes, token = tiles[i / kLanes] * kLanes + row;
      if (!takes_part(s, token)) continue;
      f32x16 apart = distance(p, load(dots + i * kLanes), offset + splat(s.offset[token]));
      if (token / kLanes == other) {
        store(own, apart);
        own[row] = -kNone;
        apart = load(own);
      } else {
        float* least = s.apart + worker * pairs + i * kLanes;
        store(least, min(load(least), apart + hide));
      }
      store(nearest, min(load(nearest), apart));
    }
  });
  for (int64_t i = 0; i < parallel.threads * pairs; ++i) {
    const int64_t row = i / kLanes % (count * kLanes);
    float& nearest = s.nearest[tiles[row / kLanes] * kLanes + row % kLanes];
    if (s.apart[i] < nearest) nearest = s.apart[i];
  }
}

// Compares up to sixteen tokens, which take part, with all others.
void compare_tokens(const GreedySelectParams& p, const Item& s, const int32_t* tokens,
                    int64_t count, const Parallel& parallel) {
  for (int64_t i = 0; i < kLanes; ++i) {
    const int64_t token = tokens[i < count ? i : 0];
    const float* lane = panel_of(p, s, token / kLanes) + token % kLanes;
    for (int64_t c = 0; c < p.channels; ++c) s.few[c * kLanes + i] = lane[c * kLanes];
  }
  const int64_t pairs = kLanes * kLanes;
  for (int64_t i = 0; i < parallel.threads * pairs; ++i) s.apart[i] = -kNone;
  parallel_tasks(parallel, s.tiles, [&](int64_t other, int64_t worker) {
    alignas(64) float dots[kLanes * kLanes] = {}, hidden[kLanes];
    for (int64_t c = 0; c < p.channels; c += kProductChannels) {
      add_products(s.few + c * kLanes, panel_of(p, s, other) + c * kLanes,
                   min(kProductChannels, p.channels - c), dots);
    }
    float* nearest = s.nearest + other * kLanes;
    const f32x16 offset = load(s.offset + other * kLanes);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t token = other * kLanes + lane;
        hidden[lane] = takes_part(s, token) && token != tokens[i] ? 0.0f : -kNone;
      }
      const f32x16 apart =
          distance(p, load(dots + i * kLanes), offset + splat(s.offset[tokens[i]])) + load(hidden);
      float* least = s.apart + worker * pairs + i * kLanes;
      store(least, min(load(least), apart));
      store(nearest, min(load(nearest), apart));
    }
  });
  for (int64_t i = 0; i < parallel.threads * pairs; ++i) {
    const int64_t row = i / kLanes % kLanes;
    if (row < count && s.apart[i] < s.nearest[tokens[row]]) s.nearest[tokens[row]] = s.apart[i];
  }
}

// The score of a token as first pick, or an upper bound of it while it has not been compared with
// all others.
float isolation(const GreedySelectParams& p, const Item& s, int64_t token) {
  const float weight = weight_of(p, s, token), nearest = s.nearest[token];
  if (!takes_part(s, token)) return kNone;
  return weight < 0 || nearest == -kNone ? -kNone : weight * nearest;
}

// Compares the tokens of the largest bounds with all others, sixteen a round. Returns the best of
// them, or -1, and its score; is_best says whether no bound of another token is above it.
int64_t best_by_bounds(const GreedySelectParams& p, const Item& s, const Parallel& parallel,
                       float& score, bool& is_best) {
  int64_t best = -1;
  for (int64_t token = 0; token < s.tiles * kLanes; ++token) s.compared[token] = false;
  for (int64_t round = 0;; ++round) {
    int32_t tokens[kLanes];
    float bounds[kLanes];
    int64_t count = 0;
    for (int64_t token = 0; token < s.tiles * kLanes; ++token) {
      const float bound = s.compared[token] ? kNone : isolation(p, s, token);
      if (!(bound > score || (bound == score && token < best))) continue;
      if (count == kLanes && bound <= bounds[count - 1]) continue;
      int64_t at = count < kLanes ? count++ : count - 1;
      for (; at > 0 && bounds[at - 1] < bound; --at) {
        bounds[at] = bounds[at - 1];
        tokens[at] = tokens[at - 1];
      }
      bounds[at] = bound;
      tokens[at] = static_cast<int32_t>(token);
    }
    is_best = count == 0;
    if (is_best || round == kRounds) return best;
    compare_tokens(p, s, tokens, count, parallel);
    for (int64_t i = 0; i < count; ++i) {
      s.compared[tokens[i]] = true;
      const float apart = weight_of(p, s, tokens[i]) * s.nearest[tokens[i]];
      if (apart > score || (apart == score && tokens[i] < best)) {
        score = apart;
        best = tokens[i];
      }
    }
  }
}

// The bound of the tile's scores as first picks; of a tile that is done, its best score and token.
void note_isolation(const GreedySelectParams& p, const Item& s, int64_t tile, bool is_alone) {
  float score[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t token = tile * kLanes + lane;
    const float weight = weight_of(p, s, token), nearest = is_alone ? 0.0f : s.nearest[token];
    const float apart = p.metric == Metric::l2 ? __builtin_sqrtf(nearest) : nearest;
    const bool may_rise = !s.done[tile] && (weight < 0 || apart == -kNone);
    score[lane] = !takes_part(s, token) ? kNone : may_rise ? -kNone : weight * apart;
  }
  note_best(s, tile, score);
}

// Sets nearest[token] to an upper bound: the distance to the token of the nearest sketch, the
// minimum over kGuesses of them, each the nearest among every kGuesses-th token.
template <class T>
void guess_nearest(const GreedySelectParams& p, const Item& s, int64_t tile) {
  // What sums of C rounded products of unit tokens may be off, here, in compare_tiles() and
  // compare_tokens() and in norms.
  const float slack = static_cast<float>(p.channels) * 0x1p-22f;
  f32x16 best[kGuesses];
  i32x16 where[kGuesses];
  for (int64_t guess = 0; guess < kGuesses; ++guess) {
    best[guess] = splat(kNone);
    where[guess] = splat(int32_t{-1});
  }
  for (int64_t other = 0; other < s.tiles; ++other) {
    if (other == tile) continue;
    alignas(64) float dots[kLanes * kLanes] = {};
    add_products(s.sketch + other * kSketch * kLanes, s.sketch + tile * kSketch * kLanes, kSketch,
                 dots);
    for (int64_t row = 0; row < kLanes; ++row) {
      const f32x16 dot = load(dots + row * kLanes);
      f32x16& most = best[row % kGuesses];
      i32x16& token = where[row % kGuesses];
      token = select_greater(dot, most, splat(static_cast<int32_t>(other * kLanes + row)), token);
      most = select_greater(dot, most, dot, most);
    }
  }
  for (int64_t guess = 0; guess < kGuesses; ++guess) {
    int32_t others[kLanes];
    store(others, where[guess]);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t token = tile * kLanes + lane, other = others[lane];
      if (other < 0 || !takes_part(s, token) || !takes_part(s, other)) continue;
      const float dot = dot_row(token_row<T>(p.x, s.number, token),
                                token_row<T>(p.x, s.number, other), p.channels);
      const float cosine = dot * inverse_norm(s.squared[token]) * inverse_norm(s.squared[other]);
      const float apart = (cosine < 1.0f ? 1.0f - cosine : 0.0f) + slack;
      if (apart < s.nearest[token]) s.nearest[token] = apart;
    }
  }
}

// The token of the largest weighted distance to its nearest other one, or -1. Every pair of tiles
// is compared at most once, and a tile only while its bound reaches the best score so far.
template <class T>
int64_t most_isolated(const GreedySelectParams& p, const Item& s, const Parallel& parallel) {
  int64_t members = 0, best = -1;
  float score = kNone;
  for (int64_t tile = 0; tile < s.tiles; ++tile) {
    const int64_t before = members;
    for (int64_t token = tile * kLanes; token < (tile + 1) * kLanes; ++token) {
      s.nearest[token] = -kNone;
      members += takes_part(s, token);
    }
    s.done[tile] = members == before;
    s.bound[tile] = s.done[tile] ? kNone : -kNone;
  }
  if (s.sketch) {
    parallel_tasks(parallel, s.tiles, [&](int64_t tile, int64_t) { guess_nearest<T>(p, s, tile); });
    bool is_best = members == 1;
    if (!is_best) best = best_by_bounds(p, s, parallel, score, is_best);
    if (is_best && best >= 0) return best;
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
      if (!s.done[tile]) note_isolation(p, s, tile, false);
    }
  }
  for (;;) {
    int64_t tiles[kComparedTiles], count = 0;
    for (; count < kComparedTiles; ++count) {
      const int64_t tile = first_max(s.bound, round_up(s.tiles, kLanes));
      if (tile < 0 || s.bound[tile] < score) break;
      tiles[count] = tile;
      s.bound[tile] = kNone;
    }
    if (count == 0) return best;
    compare_tiles(p, s, tiles, count, parallel);
    for (int64_t i = 0; i < count; ++i) s.done[tiles[i]] = true;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t tile = tiles[i];
      note_isolation(p, s, tile, members == 1);
      const bool ties = s.bound[tile] == score && s.best[tile] < best;
      if (s.best[tile] >= 0 && (s.bound[tile] > score || ties)) {
        score = s.bound[tile];
        best = s.best[tile];
      }
      s.bound[tile] = kNone;
    }
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
      if (!s.done[tile]) note_isolation(p, s, tile, false);
    }
  }
}

// The current scores of a tile.
TOKRED_INLINE f32x16 scores(const GreedySelectParams& p, const Item& s, int64_t tile,
                            f32x16 value) {
  const bool is_square = p.metric == Metric::l2 && p.rule != GreedyRule::maxsum;
  return fma(load(s.gain + tile * kLanes), is_square ? sqrt(value) : value,
             load(s.add + tile * kLanes));
}

// Compares a tile with tokens picked since its last update; kCatchUp of them may lower its bound
// enough.
void catch_up(const GreedySelectParams& p, const Item& s, int64_t tile) {
  const int64_t seen = s.seen[tile], missed = s.count - seen;
  const int64_t rows = s.rises[tile] ? missed : min(missed, kCatchUp);
  const f32x16 offset = load(s.offset + tile * kLanes);
  f32x16 value = load(s.value + tile * kLanes);
  multiply<Layout::row_step>(s.chosen + seen * p.channels, p.channels, rows, panel_of(p, s, tile),
                             0, 1, p.channels, [&](int64_t row, int, f32x16 dot) {
                               const f32x16 offsets = offset + splat(s.chosen_offset[seen + row]);
                               value = min(distance(p, dot, offsets), value);
                             });
  store(s.value + tile * kLanes, value);
  s.seen[tile] = static_cast<int32_t>(seen + rows);
  note_best(s, tile, scores(p, s, tile, value));
}

// emit(tile, dot) for the products of a row with the tiles [first, last).
template <class Emit>
TOKRED_INLINE void pass(const GreedySelectParams& p, const Item& s, const float* row, int64_t first,
                        int64_t last, const Emit& emit) {
  const int64_t stride = p.channels * kLanes;
  for (; first + kRowTiles <= last; first += kRowTiles) {
    tile<1, kRowTiles, Layout::row_step>(
        row, 0, panel_of(p, s, first), stride, p.channels,
        [&](int, int panel, f32x16 dot) { emit(first + panel, dot); });
  }
  for (; first < last; ++first) {
    tile<1, 1, Layout::row_step>(row, 0, panel_of(p, s, first), stride, p.channels,
                                 [&](int, int, f32x16 dot) { emit(first, dot); });
  }
}

// Gives a column to a token, and takes it from the one that had it.
int64_t give_column(const Item& s, int64_t token, int64_t column) {
  if (s.owner[column] >= 0) s.column_of[s.owner[column]] = -1;
  s.owner[column] = static_cast<int32_t>(token);
  s.column_of[token] = static_cast<int32_t>(column);
  return column;
}

// Fills columns of distances: to the picked token and, after the second pick, to the best tokens of
// the best tiles, which are likely to be picked next.
void measure(const GreedySelectParams& p, Item& s, int64_t picked, const Parallel& parallel) {
  const int64_t lanes = s.tiles * kLanes;
  int64_t columns[kAhead], count = 0;
  for (int64_t token = picked; token >= 0;) {
    columns[count] = give_column(s, token, s.next_column++ % s.num_columns);
    const float* lane = panel_of(p, s, token / kLanes) + token % kLanes;
    for (int64_t c = 0; c < p.channels; ++c) s.chosen[c * kAhead + count] = lane[c * kLanes];
    s.chosen_offset[count++] = s.offset[token];
    token = -1;
    while (s.count > 1 && count < s.ahead && token < 0) {
      const int64_t tile = first_max(s.bound, round_up(s.tiles, kLanes));
      if (tile < 0) break;
      s.bound[tile] = kNone;  // add_distances() sets all bounds again
      const int64_t best = s.best[tile];
      if (s.add[best] > kNone && s.column_of[best] < 0) token = best;
    }
  }
  parallel_tasks(parallel, divide_up(s.tiles, kPassTiles), [&](int64_t task, int64_t) {
    const int64_t last = min((task + 1) * kPassTiles, s.tiles);
    for (int64_t tile = task * kPassTiles, panels; tile < last; tile += panels) {
      panels = min(kTilePanels<float>, last - tile);
      multiply<Layout::step_row>(s.chosen, kAhead, count, panel_of(p, s, tile), p.channels * kLanes,
                                 panels, p.channels, [&](int64_t row, int panel, f32x16 dot) {
                                   const int64_t at = (tile + panel) * kLanes;
                                   f32x16 apart = distance(
                                       p, dot, load(s.offset + at) + splat(s.chosen_offset[row]));
                                   if (p.metric == Metric::l2) apart = sqrt(apart);
                                   store(s.columns + columns[row] * lanes + at, apart);
                                 });
    }
  });
}

// Adds to all values the distances to the token picked last.
void add_distances(const GreedySelectParams& p, Item& s, int64_t token, const Parallel& parallel) {
  if (s.column_of[token] < 0) measure(p, s, token, parallel);
  const float* column = s.columns + s.column_of[token] * s.tiles * kLanes;
  for (int64_t tile = 0; tile < s.tiles; ++tile) {
    float* value = s.value + tile * kLanes;
    store(value, load(value) + load(column + tile * kLanes));
    s.seen[tile] = static_cast<int32_t>(s.count);
    note_best(s, tile, scores(p, s, tile, load(value)));
  }
}

// emit(row, tile, dot) for the products of up to kCandidates tokens with all tokens.
template <class Emit>
TOKRED_INLINE void multiply_all(const GreedySelectParams& p, const Item& s, const int32_t* tokens,
                                int64_t count, float* rows, const Emit& emit) {
  // Channel by channel: rows a power of two apart would fall into the same set of the cache.
  for (int64_t i = 0; i < count; ++i) {
    const float* lane = panel_of(p, s, tokens[i] / kLanes) + tokens[i] % kLanes;
    for (int64_t c = 0; c < p.channels; ++c) rows[c * kCandidates + i] = lane[c * kLanes];
  }
  for (int64_t tile = 0, panels; tile < s.tiles; tile += panels) {
    panels = min(kTilePanels<float>, s.tiles - tile);
    multiply<Layout::step_row>(
        rows, kCandidates, count, panel_of(p, s, tile), p.channels * kLanes, panels, p.channels,
        [&](int64_t row, int panel, f32x16 dot) { emit(row, tile + panel, dot); });
  }
}

// The facility gain of a token: the sum over all tokens of how much it would raise their value.
void note_gain(const Item& s, int64_t token, f32x16 gain) {
  const float score = s.gain[token] * sum(gain) + s.add[token];
  s.bound[token] = score > kNone ? score : kNone;
  s.seen[token] = static_cast<int32_t>(s.count);
}
TOKRED_INLINE f32x16 uncovered(const Item& s, int64_t tile, f32x16 dot) {
  return max(dot - load(s.value + tile * kLanes), splat(0.0f));
}

// The gains of up to kCandidates tokens.
void sum_gains(const GreedySelectParams& p, const Item& s, const int32_t* tokens, int64_t count,
               float* rows) {
  f32x16 gain[kCandidates];
  for (f32x16& sum : gain) sum = splat(0.0f);
  multiply_all(p, s, tokens, count, rows, [&](int64_t row, int64_t tile, f32x16 dot) {
    gain[row] = gain[row] + uncovered(s, tile, dot);
  });
  for (int64_t i = 0; i < count; ++i) note_gain(s, tokens[i], gain[i]);
}

// The same for up to kCandidates tokens a thread, from their columns of similarities, which are
// kept because the same candidates come again and again.
void sum_gains_again(const GreedySelectParams& p, Item& s, int32_t* tokens, int64_t count,
                     const Parallel& parallel) {
  const int64_t lanes = s.tiles * kLanes;
  int32_t* fresh = tokens + count;
  int64_t number = 0;
  const auto is_needed = [&](int32_t token) {
    bool found = false;
    for (int64_t i = 0; i < count; ++i) found |= tokens[i] == token;
    return found;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (s.column_of[tokens[i]] >= 0) continue;
    while (is_needed(s.owner[s.next_column % s.num_columns])) ++s.next_column;
    give_column(s, tokens[i], s.next_column++ % s.num_columns);
    fresh[number++] = tokens[i];
  }
  parallel_tasks(parallel, divide_up(number, kCandidates), [&](int64_t task, int64_t worker) {
    const int32_t* some = fresh + task * kCandidates;
    multiply_all(p, s, some, min(kCandidates, number - task * kCandidates),
                 s.chosen + worker * kCandidates * p.channels,
                 [&](int64_t row, int64_t tile, f32x16 dot) {
                   store(s.columns + s.column_of[some[row]] * lanes + tile * kLanes, dot);
                 });
  });
  for (int64_t i = 0; i < count; ++i) {
    const float* column = s.columns + s.column_of[tokens[i]] * lanes;
    f32x16 gain = splat(0.0f);
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
      gain = gain + uncovered(s, tile, load(column + tile * kLanes));
    }
    note_gain(s, tokens[i], gain);
  }
}

void sum_all_gains(const GreedySelectParams& p, const Item& s, const Parallel& parallel) {
  const int64_t lanes = s.tiles * kLanes;
  parallel_tasks(parallel, divide_up(lanes, kCandidates), [&](int64_t task, int64_t worker) {
    int32_t tokens[kCandidates];
    const int64_t first = task * kCandidates, count = min(kCandidates, lanes - first);
    for (int64_t i = 0; i < count; ++i) tokens[i] = static_cast<int32_t>(first + i);
    sum_gains(p, s, tokens, count, s.chosen + worker * kCandidates * p.channels);
  });
}

// Raises all values to the similarity with the picked token, where that is larger.
void cover(const GreedySelectParams& p, const Item& s, int64_t token, const Parallel& parallel) {
  if (s.column_of[token] >= 0) {
    const float* column = s.columns + s.column_of[token] * s.tiles * kLanes;
    for (int64_t lane = 0; lane < s.tiles * kLanes; lane += kLanes) {
      store(s.value + lane, max(load(column + lane), load(s.value + lane)));
    }
    return;
  }
  unpack_token(s.panels, p.channels, token, s.chosen);
  parallel_tasks(parallel, divide_up(s.tiles, kBlock), [&](int64_t task, int64_t) {
    const int64_t last = min((task + 1) * kBlock, s.tiles);
    pass(p, s, s.chosen, task * kBlock, last, [&](int64_t tile, f32x16 dot) {
      float* value = s.value + tile * kLanes;
      store(value, max(dot, load(value)));
    });
  });
}

// Writes the token to the result, and updates what the scores depend on.
void pick(const GreedySelectParams& p, Item& s, int64_t token, const Parallel& parallel) {
  p.indices[s.number * p.k + s.count] = static_cast<int32_t>(token);
  s.add[token] = kNone;
  const int64_t count = s.count++;
  if (p.rule == GreedyRule::facility) {
    cover(p, s, token, parallel);
    s.bound[token] = kNone;
    for (int64_t other = 0; s.any_rises && other < s.tiles * kLanes; ++other) {
      if (s.gain[other] < 0 && s.add[other] > kNone) s.bound[other] = -kNone;
    }
    return;
  }
  if (p.rule == GreedyRule::maxsum) return add_distances(p, s, token, parallel);
  unpack_token(s.panels, p.channels, token, s.chosen + count * p.channels);
  s.chosen_offset[count] = s.offset[token];
  for (int64_t tile = 0; s.any_rises && tile < s.tiles; ++tile) {
    if (s.rises[tile]) s.bound[tile] = -kNone;
  }
}

// The token of the best current score; -1 where none is left.
int64_t next_pick(const GreedySelectParams& p, Item& s, const Parallel& parallel) {
  const bool is_facility = p.rule == GreedyRule::facility;
  const int64_t bounds = is_facility ? s.tiles * kLanes : round_up(s.tiles, kLanes);
  const int64_t a_wave = is_facility            ? kCandidates * parallel.threads
                         : parallel.threads > 1 ? kWave * parallel.threads
                                                : 1;
  for (;;) {
    int64_t first = first_max(s.bound, bounds);
    if (first < 0) return -1;
    if (s.seen[first] == s.count) return is_facility ? first : s.best[first];
    int64_t count = 0;
    while (count < a_wave && first >= 0 && s.seen[first] < s.count) {
      s.bound[first] = kNone;
      s.wave[count++] = static_cast<int32_t>(first);
      if (count < a_wave) first = first_max(s.bound, bounds);
    }
    if (is_facility) {
      sum_gains_again(p, s, s.wave, count, parallel);
    } else {
      parallel_tasks(parallel, count, [&](int64_t task, int64_t) { catch_up(p, s, s.wave[task]); });
    }
  }
}

// The token to start with, or -1.
int64_t start_of(const GreedySelectParams& p, const Item& s) {
  const int64_t token = p.start ? p.start[s.number * p.start_stride] : -1;
  return token >= 0 && token < p.x.tokens && takes_part(s, token) ? token : -1;
}

template <class T>
void select_from_item(const GreedySelectParams& p, Item s, const Parallel& parallel) {
  const int64_t padded = round_up(s.tiles, kLanes);
  for (int64_t tile = s.tiles; tile < padded; ++tile) s.bound[tile] = kNone;
  for (int64_t i = 0; i < s.num_columns; ++i) s.owner[i] = -1;
  for (int64_t i = 0; s.column_of && i < s.tiles * kLanes; ++i) s.column_of[i] = -1;
  parallel_tasks(parallel, s.tiles, [&](int64_t tile, int64_t) { prepare_tile<T>(p, s, tile); });
  for (int64_t tile = 0; tile < s.tiles; ++tile) s.any_rises |= s.rises[tile];

  const bool is_facility = p.rule == GreedyRule::facility;
  int64_t token = start_of(p, s);
  const bool by_gain = token < 0 && is_facility && p.first == FirstPick::rule;
  if (token < 0 && !by_gain) {
    if (p.first == FirstPick::isolated) {
      token = most_isolated<T>(p, s, parallel);
    } else {
      const int64_t tile = first_max(s.bound, padded);
      token = tile < 0 ? -1 : s.best[tile];
    }
  }
  for (int64_t tile = 0; tile < s.tiles; ++tile) {
    s.bound[tile] = -kNone;
    s.seen[tile] = 0;
  }
  if (token >= 0) pick(p, s, token, parallel);
  if (is_facility) sum_all_gains(p, s, parallel);
  while (s.count < p.k && (s.count > 0 || by_gain)) {
    token = next_pick(p, s, parallel);
    if (token < 0) break;
    pick(p, s, token, parallel);
  }
  for (int64_t i = s.count; i < p.k; ++i) p.indices[s.number * p.k + i] = -1;
}

}  // namespace

int64_t greedy_select_workspace(const GreedySelectParams& p, const Parallel& parallel) {
  return item_threads(p, parallel).bytes([&](int64_t threads, Workspace& workspace) {
    return carve(p, threads, workspace);
  });
}

void greedy_select(const GreedySelectParams& p, const Parallel& parallel) {
  const auto memory = [&](int64_t threads, Workspace& workspace) {
    return carve(p, threads, workspace);
  };
  visit_f32(p.dtype, [&]<class T>() {
    item_threads(p, parallel)
        .for_each(p.batch, p.workspace, memory,
                  [&](int64_t number, Item item, const Parallel& inside) {
                    item.number = number;
                    select_from_item<T>(p, item, inside);
                  });
  });
}

}  // namespace tokred::TOKRED_ISA
