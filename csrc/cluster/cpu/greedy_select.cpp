// greedy_select: lazy greedy, exactly. Scores only fall as tokens are picked, so a tile of sixteen
// tokens keeps the best score that it once had as a bound, and meets the tokens picked since then,
// many at a time in register tiles, only when that bound is the best of all. Of facility, tokens
// keep bounds of their own.
//
// [16, 1024, 64], k = 256: all pairs of a token and a picked one are 0.54 GFLOP, 11 ms at 50
// GFLOP/s; where a loop reads all tokens at every step, a twentieth of them is read. Sums of
// distances rise, and so may scores with negative weights: those meet every picked token at once.
//
// The most isolated token of [1, 2880, 4096]: 34 GFLOP for every pair once, 340 ms at 100 GFLOP/s,
// and less the more tiles cannot hold it.
#include "cluster/cpu/items.h"
#include "cluster/cpu/panels.h"
#include "cluster/params.h"
#include "common/cpu/parallel.h"
#include "common/cpu/workspace.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr float kNone = -__builtin_inff();
constexpr int64_t kAbreast = kRegisterBytes == 16 ? 2 : 4;  // tiles that meet a token together
constexpr int64_t kMeeting = 4 * kTileRows<float>;  // picked tokens that a tile meets in a row
constexpr int64_t kCandidates = kTileRows<float>;  // whose gains are summed together
constexpr int64_t kWideWork = 1 << 18;  // numbers of an item that threads share
constexpr int64_t kWave = 8;  // tiles a thread, where they share one
constexpr int64_t kBlock = 64;  // tiles of a task, where all of them are passed through
constexpr int64_t kTogether = 4;  // tiles that meet all others in one pass over these
constexpr int64_t kChunk = 128;  // channels of them that the first-level cache holds
constexpr int kProductRows = min(kTileRows<float> * kTilePanels<float>, 16);

// The working arrays of an item. The score of a token is gain * value + add; add is -inf where it
// is picked or does not take part. value: the least distance to a picked token (of l2 its square),
// the sum of the distances, or, of facility, what the token is covered by.
struct Item {
  int64_t number, tiles, count;  // count: tokens picked so far
  float *panels, *offset, *squared, *gain, *add, *value;  // f32 [tiles][16]; panels [.. C ..]
  float* bound;    // f32 [tiles], of facility [tiles][16]: the best score at an earlier count
  int32_t* best;   // i32 [tiles]: the token that had it
  int32_t* seen;   // i32, as bound: that count
  bool* rises;     // bool [tiles]: scores may rise
  bool any_rises;
  float* nearest;  // f32 [tiles][16]: the least distance to another token that is known
  float* apart;    // f32 [threads][kTogether][16][16]: that of a row to the tokens of each lane
  bool* done;      // bool [tiles]: whether a tile has met all others
  float *chosen, *chosen_offset;  // the picked tokens as rows, or candidates of each thread
  int32_t* wave;   // i32 [kWave * threads]: tiles or tokens that are met next
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
  const int64_t rows = is_facility ? max(1, kCandidates * threads) : min(p.k, p.x.tokens);
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
    s.apart = workspace.allocate<float>(threads * kTogether * kLanes * kLanes);
    s.done = workspace.allocate<bool>(s.tiles);
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
  const int64_t first = first_greatest(score, kLanes);
  s.bound[tile] = first < 0 ? kNone : score[first];
  s.best[tile] = static_cast<int32_t>(first < 0 ? -1 : tile * kLanes + first);
}
void note_best(const Item& s, int64_t tile, f32x16 score) {
  alignas(64) float lane[kLanes];
  store(lane, score);
  note_best(s, tile, lane);
}

// Packs a tile, and scores its tokens as first picks.
template <class T>
void prepare_tile(const GreedySelectParams& p, const Item& s, int64_t tile) {
  const int64_t token0 = tile * kLanes;
  pack_panel<T>(p.x, s.number, token0, p.channels, p.metric, panel_of(p, s, tile),
                s.offset + token0, s.squared + token0);
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

// Of l2, squares.
TOKRED_INLINE f32x16 distance(const GreedySelectParams& p, f32x16 dot, f32x16 offsets) {
  const f32x16 apart = fma(splat(distance_scale(p.metric)), dot, offsets);
  return p.metric == Metric::dot ? apart : max(apart, splat(0.0f));
}

// sums[row] += row `row` of a tile . panel, over the channels in their order.
template <int kRows>
TOKRED_INLINE void add_products(const float* rows, const float* panel, int64_t channels,
                                int64_t row, float* sums) {
  for (; row + kRows <= kLanes; row += kRows) {
    f32x16 sum[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) sum[r] = load(sums + (row + r) * kLanes);
    for (int64_t c = 0; c < channels; ++c) {
      const f32x16 lanes = load(panel + c * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        sum[r] = fma(splat(rows[c * kLanes + row + r]), lanes, sum[r]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) store(sums + (row + r) * kLanes, sum[r]);
  }
  if constexpr (kRows > 1) {
    add_products<(kRows > 4 ? 4 : kRows - 1)>(rows, panel, channels, row, sums);
  }
}

// `count` tiles meet every tile that has not met all, each other and themselves.
void meet_all(const GreedySelectParams& p, const Item& s, const int64_t* tiles, int64_t count,
              const Parallel& parallel) {
  const int64_t pairs = count * kLanes * kLanes;
  for (int64_t i = 0; i < parallel.threads * pairs; ++i) s.apart[i] = -kNone;
  parallel_tasks(parallel, s.tiles, [&](int64_t other, int64_t worker) {
    if (s.done[other]) return;
    int64_t here = count;  // of two of these tiles the later one meets the earlier
    for (int64_t i = 0; i < count; ++i) here = tiles[i] == other ? i + 1 : here;
    alignas(64) float dots[kTogether * kLanes * kLanes] = {};
    for (int64_t c = 0; c < p.channels; c += kChunk) {
      const int64_t channels = min(kChunk, p.channels - c);
      for (int64_t i = 0; i < here; ++i) {
        add_products<kProductRows>(panel_of(p, s, tiles[i]) + c * kLanes,
                                   panel_of(p, s, other) + c * kLanes, channels, 0,
                                   dots + i * kLanes * kLanes);
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

// The bound of the tile's scores as first picks, and the best token once it has met all others.
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

// The token of the largest weighted distance to its nearest other one, or -1. Every pair of tiles
// meets at most once, and a tile only while its bound reaches the best score so far.
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
  for (;;) {
    int64_t tiles[kTogether], count = 0;
    for (; count < kTogether; ++count) {
      const int64_t tile = first_greatest(s.bound, round_up(s.tiles, kLanes));
      if (tile < 0 || s.bound[tile] < score) break;
      tiles[count] = tile;
      s.bound[tile] = kNone;
    }
    if (count == 0) return best;
    meet_all(p, s, tiles, count, parallel);
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

// Scores of a tile as they are now.
TOKRED_INLINE f32x16 scores(const GreedySelectParams& p, const Item& s, int64_t tile,
                            f32x16 value) {
  const bool is_square = p.metric == Metric::l2 && p.rule != GreedyRule::maxsum;
  return fma(load(s.gain + tile * kLanes), is_square ? sqrt(value) : value,
             load(s.add + tile * kLanes));
}

// A tile meets tokens picked since it was last seen; kMeeting of them may lower its bound enough.
void meet(const GreedySelectParams& p, const Item& s, int64_t tile) {
  const int64_t seen = s.seen[tile], missed = s.count - seen;
  const int64_t rows = s.rises[tile] ? missed : min(missed, kMeeting);
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

// emit(tile, dot) of the row with all of the tiles [first, last).
template <class Emit>
TOKRED_INLINE void pass(const GreedySelectParams& p, const Item& s, const float* row, int64_t first,
                        int64_t last, const Emit& emit) {
  const int64_t stride = p.channels * kLanes;
  for (; first + kAbreast <= last; first += kAbreast) {
    tile<1, kAbreast, Layout::row_step>(
        row, 0, panel_of(p, s, first), stride, p.channels,
        [&](int, int panel, f32x16 dot) { emit(first + panel, dot); });
  }
  for (; first < last; ++first) {
    tile<1, 1, Layout::row_step>(row, 0, panel_of(p, s, first), stride, p.channels,
                                 [&](int, int, f32x16 dot) { emit(first, dot); });
  }
}

// All tiles add their distances to the token picked last.
void add_distances(const GreedySelectParams& p, const Item& s, const Parallel& parallel) {
  const float* row = s.chosen + (s.count - 1) * p.channels;
  const f32x16 offset = splat(s.chosen_offset[s.count - 1]);
  parallel_tasks(parallel, divide_up(s.tiles, kBlock), [&](int64_t task, int64_t) {
    const int64_t last = min((task + 1) * kBlock, s.tiles);
    pass(p, s, row, task * kBlock, last, [&](int64_t tile, f32x16 dot) {
      float* value = s.value + tile * kLanes;
      f32x16 apart = distance(p, dot, load(s.offset + tile * kLanes) + offset);
      if (p.metric == Metric::l2) apart = sqrt(apart);
      store(value, load(value) + apart);
      s.seen[tile] = static_cast<int32_t>(s.count);
      note_best(s, tile, scores(p, s, tile, load(value)));
    });
  });
}

// The gains of up to kCandidates tokens: what they would cover beyond what is covered.
void sum_gains(const GreedySelectParams& p, const Item& s, const int32_t* tokens, int64_t count,
               float* rows) {
  for (int64_t i = 0; i < count; ++i) {
    unpack_token(s.panels, p.channels, tokens[i], rows + i * p.channels);
  }
  f32x16 gain[kCandidates];
  for (f32x16& sum : gain) sum = splat(0.0f);
  for (int64_t tile = 0; tile < s.tiles; ++tile) {
    const f32x16 covered = load(s.value + tile * kLanes);
    multiply<Layout::row_step>(rows, p.channels, count, panel_of(p, s, tile), 0, 1, p.channels,
                               [&](int64_t row, int, f32x16 dot) {
                                 gain[row] = gain[row] + max(dot - covered, splat(0.0f));
                               });
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = tokens[i];
    const float score = s.gain[token] * sum(gain[i]) + s.add[token];
    s.bound[token] = score > kNone ? score : kNone;
    s.seen[token] = static_cast<int32_t>(s.count);
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

// Everything is covered at least as well as by the token.
void cover(const GreedySelectParams& p, const Item& s, int64_t token, const Parallel& parallel) {
  unpack_token(s.panels, p.channels, token, s.chosen);
  parallel_tasks(parallel, divide_up(s.tiles, kBlock), [&](int64_t task, int64_t) {
    const int64_t last = min((task + 1) * kBlock, s.tiles);
    pass(p, s, s.chosen, task * kBlock, last, [&](int64_t tile, f32x16 dot) {
      float* value = s.value + tile * kLanes;
      store(value, max(dot, load(value)));
    });
  });
}

// Writes the token down, and what is then known of the scores.
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
  unpack_token(s.panels, p.channels, token, s.chosen + count * p.channels);
  s.chosen_offset[count] = s.offset[token];
  if (p.rule == GreedyRule::maxsum) return add_distances(p, s, parallel);
  for (int64_t tile = 0; s.any_rises && tile < s.tiles; ++tile) {
    if (s.rises[tile]) s.bound[tile] = -kNone;
  }
}

// The best token, once its score is known; -1 where none is left.
int64_t next_pick(const GreedySelectParams& p, Item& s, const Parallel& parallel) {
  const bool is_facility = p.rule == GreedyRule::facility;
  const int64_t bounds = is_facility ? s.tiles * kLanes : round_up(s.tiles, kLanes);
  const int64_t a_wave = is_facility            ? kCandidates * parallel.threads
                         : parallel.threads > 1 ? kWave * parallel.threads
                                                : 1;
  for (;;) {
    int64_t first = first_greatest(s.bound, bounds);
    if (first < 0) return -1;
    if (s.seen[first] == s.count) return is_facility ? first : s.best[first];
    int64_t count = 0;
    while (count < a_wave && first >= 0 && s.seen[first] < s.count) {
      s.bound[first] = kNone;
      s.wave[count++] = static_cast<int32_t>(first);
      if (count < a_wave) first = first_greatest(s.bound, bounds);
    }
    if (is_facility) {
      parallel_tasks(parallel, divide_up(count, kCandidates), [&](int64_t task, int64_t worker) {
        const int64_t begin = task * kCandidates;
        sum_gains(p, s, s.wave + begin, min(kCandidates, count - begin),
                  s.chosen + worker * kCandidates * p.channels);
      });
    } else {
      parallel_tasks(parallel, count, [&](int64_t task, int64_t) { meet(p, s, s.wave[task]); });
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
  parallel_tasks(parallel, s.tiles, [&](int64_t tile, int64_t) { prepare_tile<T>(p, s, tile); });
  for (int64_t tile = 0; tile < s.tiles; ++tile) s.any_rises |= s.rises[tile];

  const bool is_facility = p.rule == GreedyRule::facility;
  int64_t token = start_of(p, s);
  const bool by_gain = token < 0 && is_facility && p.first == FirstPick::rule;
  if (token < 0 && !by_gain) {
    if (p.first == FirstPick::isolated) {
      token = most_isolated(p, s, parallel);
    } else {
      const int64_t tile = first_greatest(s.bound, padded);
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
