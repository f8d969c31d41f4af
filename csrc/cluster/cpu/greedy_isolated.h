// greedy_select: the most isolated token as the first pick, by bounds (branch and bound).
//
// The most isolated token of [1, 2880, 4096]: 34 GFLOP for every pair once, 340 ms at 100 GFLOP/s.
// By cosine, sketches of 64 channels (Charikar, Chen and Farach-Colton's count sketch) first find
// four tokens that may be near each token; the distance to the nearest of the four, plus what
// rounding may add, bounds the distance to the nearest of all. Tiles whose bounds are below the
// best token found need no comparison: of clustered tokens that is nearly all of them.
#pragma once

#include "cluster/cpu/greedy_item.h"
#include "common/cpu/panel_products.h"

namespace tokred::TOKRED_ISA {

// Rounds of sixteen tokens that are compared with all, before whole tiles are.
inline constexpr int64_t kRounds = 8;
inline constexpr int64_t kGuesses = 4;  // possible neighbours of a token that sketches give

// Compares `count` tiles with all tiles that are not done, with each other and with themselves.
inline void compare_tiles(const GreedySelectParams& p, const GreedyItem& s, const int64_t* tiles,
                          int64_t count, const Parallel& parallel) {
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
        float* smallest = s.apart + worker * pairs + i * kLanes;
        store(smallest, min(load(smallest), apart + hide));
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
inline void compare_tokens(const GreedySelectParams& p, const GreedyItem& s, const int32_t* tokens,
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
      float* smallest = s.apart + worker * pairs + i * kLanes;
      store(smallest, min(load(smallest), apart));
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
inline float isolation(const GreedySelectParams& p, const GreedyItem& s, int64_t token) {
  const float weight = weight_of(p, s, token), nearest = s.nearest[token];
  if (!takes_part(s, token)) return kNone;
  return weight < 0 || nearest == -kNone ? -kNone : weight * nearest;
}

// Compares the tokens of the largest bounds with all others, sixteen a round. Returns the best of
// them, or -1, and its score; is_best says whether no bound of another token is above it.
inline int64_t best_by_bounds(const GreedySelectParams& p, const GreedyItem& s,
                              const Parallel& parallel, float& score, bool& is_best) {
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
inline void note_isolation(const GreedySelectParams& p, const GreedyItem& s, int64_t tile,
                           bool is_alone) {
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
inline void guess_nearest(const GreedySelectParams& p, const GreedyItem& s, int64_t tile) {
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
inline int64_t most_isolated(const GreedySelectParams& p, const GreedyItem& s,
                             const Parallel& parallel) {
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

}  // namespace tokred::TOKRED_ISA
