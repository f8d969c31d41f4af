// greedy_select: lazy greedy (Minoux, 1978), exact. Scores only fall as tokens are picked, so the
// best score that a tile of sixteen tokens once had is a bound. The tile is compared with the
// tokens picked since then, many at a time in register tiles, only when that bound is the best of
// all. For facility, every token has a bound of its own.
//
// From the end of the file upwards: select_from_item() takes the first pick (greedy_isolated.h
// finds the most isolated token), then repeats next_pick(), which brings the best bounds up to date
// until one of them is a score, and pick(). What a pick changes depends on the rule: minimum
// distances (catch_up), sums of distances (add_distances) or what the picks cover (cover, and the
// gains of candidates).
//
// [16, 1024, 64], k = 256: all pairs of a token and a picked one are 0.54 GFLOP, 11 ms at 50
// GFLOP/s; a plain loop reads all tokens at every step, this one a twentieth of them. Sums of
// distances rise, and so may scores with negative weights: these are updated at every pick. Where
// the tokens are more than a cache holds, one pass over them measures the distances to a dozen
// tokens in the time of one: the token just picked and the most likely next picks. Of 64 picks of
// [1, 2880, 4096] twenty read all tokens.
#include "cluster/cpu/greedy_isolated.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr int64_t kRowTiles = kRegisterBytes == 16 ? 2 : 4;  // tiles multiplied with a row at once
constexpr int64_t kCatchUp = 4 * kTileRows<float>;  // picked tokens that a tile is compared with
constexpr int64_t kBlock = 64;  // tiles of a task that reads all of them
constexpr int64_t kPassTiles = 8;  // tiles of a task that measures distances to several tokens

// ---- Minimum and sum of distances ---------------------------------------------------------------

// The current scores of a tile.
TOKRED_INLINE f32x16 scores(const GreedySelectParams& p, const GreedyItem& s, int64_t tile,
                            f32x16 value) {
  const bool is_square = p.metric == Metric::l2 && p.rule != GreedyRule::maxsum;
  return fma(load(s.gain + tile * kLanes), is_square ? sqrt(value) : value,
             load(s.add + tile * kLanes));
}

// Compares a tile with tokens picked since its last update; kCatchUp of them may lower its bound
// enough.
void catch_up(const GreedySelectParams& p, const GreedyItem& s, int64_t tile) {
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
TOKRED_INLINE void pass(const GreedySelectParams& p, const GreedyItem& s, const float* row,
                        int64_t first, int64_t last, const Emit& emit) {
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
int64_t give_column(const GreedyItem& s, int64_t token, int64_t column) {
  if (s.owner[column] >= 0) s.column_of[s.owner[column]] = -1;
  s.owner[column] = static_cast<int32_t>(token);
  s.column_of[token] = static_cast<int32_t>(column);
  return column;
}

// Fills columns of distances: to the picked token and, after the second pick, to the best tokens of
// the best tiles, which are likely to be picked next.
void measure(const GreedySelectParams& p, GreedyItem& s, int64_t picked, const Parallel& parallel) {
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
void add_distances(const GreedySelectParams& p, GreedyItem& s, int64_t token,
                   const Parallel& parallel) {
  if (s.column_of[token] < 0) measure(p, s, token, parallel);
  const float* column = s.columns + s.column_of[token] * s.tiles * kLanes;
  for (int64_t tile = 0; tile < s.tiles; ++tile) {
    float* value = s.value + tile * kLanes;
    store(value, load(value) + load(column + tile * kLanes));
    s.seen[tile] = static_cast<int32_t>(s.count);
    note_best(s, tile, scores(p, s, tile, load(value)));
  }
}

// ---- Facility location --------------------------------------------------------------------------

// emit(row, tile, dot) for the products of up to kCandidates tokens with all tokens.
template <class Emit>
TOKRED_INLINE void multiply_all(const GreedySelectParams& p, const GreedyItem& s,
                                const int32_t* tokens, int64_t count, float* rows,
                                const Emit& emit) {
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
void note_gain(const GreedyItem& s, int64_t token, f32x16 gain) {
  const float score = s.gain[token] * sum(gain) + s.add[token];
  s.bound[token] = score > kNone ? score : kNone;
  s.seen[token] = static_cast<int32_t>(s.count);
}
TOKRED_INLINE f32x16 uncovered(const GreedyItem& s, int64_t tile, f32x16 dot) {
  return max(dot - load(s.value + tile * kLanes), splat(0.0f));
}

// The gains of up to kCandidates tokens.
void sum_gains(const GreedySelectParams& p, const GreedyItem& s, const int32_t* tokens,
               int64_t count, float* rows) {
  f32x16 gain[kCandidates];
  for (f32x16& sum : gain) sum = splat(0.0f);
  multiply_all(p, s, tokens, count, rows, [&](int64_t row, int64_t tile, f32x16 dot) {
    gain[row] = gain[row] + uncovered(s, tile, dot);
  });
  for (int64_t i = 0; i < count; ++i) note_gain(s, tokens[i], gain[i]);
}

// The same for up to kCandidates tokens a thread, from their columns of similarities, which are
// kept because the same candidates come again and again.
void sum_gains_again(const GreedySelectParams& p, GreedyItem& s, int32_t* tokens, int64_t count,
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

void sum_all_gains(const GreedySelectParams& p, const GreedyItem& s, const Parallel& parallel) {
  const int64_t lanes = s.tiles * kLanes;
  parallel_tasks(parallel, divide_up(lanes, kCandidates), [&](int64_t task, int64_t worker) {
    int32_t tokens[kCandidates];
    const int64_t first = task * kCandidates, count = min(kCandidates, lanes - first);
    for (int64_t i = 0; i < count; ++i) tokens[i] = static_cast<int32_t>(first + i);
    sum_gains(p, s, tokens, count, s.chosen + worker * kCandidates * p.channels);
  });
}

// Raises all values to the similarity with the picked token, where that is larger.
void cover(const GreedySelectParams& p, const GreedyItem& s, int64_t token,
           const Parallel& parallel) {
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

// ---- Picks --------------------------------------------------------------------------------------

// Writes the token to the result, and updates what the scores depend on.
void pick(const GreedySelectParams& p, GreedyItem& s, int64_t token, const Parallel& parallel) {
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
int64_t next_pick(const GreedySelectParams& p, GreedyItem& s, const Parallel& parallel) {
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
int64_t start_of(const GreedySelectParams& p, const GreedyItem& s) {
  const int64_t token = p.start ? p.start[s.number * p.start_stride] : -1;
  return token >= 0 && token < p.x.tokens && takes_part(s, token) ? token : -1;
}

template <class T>
void select_from_item(const GreedySelectParams& p, GreedyItem s, const Parallel& parallel) {
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
                  [&](int64_t number, GreedyItem item, const Parallel& inside) {
                    item.number = number;
                    select_from_item<T>(p, item, inside);
                  });
  });
}

}  // namespace tokred::TOKRED_ISA
