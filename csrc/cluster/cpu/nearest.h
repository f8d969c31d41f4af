// The nearest centroid of every token: products of tokens with panels of sixteen centroids, and the
// arg-max in registers. A row's best score and index stay in the lanes of its centroids until all
// panels have passed.
#pragma once

#include "cluster/params.h"
#include "common/cpu/register_tile.h"
#include "common/cpu/row.h"
#include "common/cpu/workspace.h"

namespace tokred::TOKRED_ISA {

// Tokens that pass all panels together: what fits an L1 at 64 channels, and enough to share panels.
inline constexpr int64_t nearest_rows(int64_t channels) { return channels <= 64 ? 96 : 48; }

// Centroids of one item, padded to whole panels.
struct CentroidPanels {
  float* lanes;  // [ceil(K / 16)][C][16]
  float* offset;  // [ceil(K / 16) * 16] added to the products: -|c|^2 / 2 or 0; -inf: never chosen
};
TOKRED_INLINE CentroidPanels allocate_panels(Workspace& memory, int64_t clusters,
                                             int64_t channels) {
  CentroidPanels panels;
  panels.lanes = memory.allocate<float>(round_up(clusters, kLanes) * channels);
  panels.offset = memory.allocate<float>(round_up(clusters, kLanes));
  return panels;
}

// One worker's memory.
struct NearestScratch {
  float* rows;  // [rows][C] tokens as fp32, of 16-bit tokens only
  float* best;  // [rows][16]
  int32_t* panel;  // [rows][16]
  // Of tokens that have bounds:
  float* squared;  // [rows] |x|^2
  float* slack;  // [rows] what rounding may add
  float* limit;  // [rows] the distance of the centroid that it has
  int32_t* row;  // [rows] those that a group is multiplied with,
  float* gathered;  // [rows][C] their numbers,
  float* product;  // [rows][16] their products with a panel, and
  float* top;  // [rows][16] their largest scores in the group
};
TOKRED_INLINE NearestScratch allocate_nearest(Workspace& memory, const ClusterTokens& t) {
  const int64_t rows = nearest_rows(t.channels);
  NearestScratch s;
  s.rows = memory.allocate<float>(t.dtype == DType::f32 ? 0 : rows * t.channels);
  s.best = memory.allocate<float>(rows * kLanes);
  s.panel = memory.allocate<int32_t>(rows * kLanes);
  s.squared = memory.allocate<float>(rows);
  s.slack = memory.allocate<float>(rows);
  s.limit = memory.allocate<float>(rows);
  s.row = memory.allocate<int32_t>(rows);
  s.gathered = memory.allocate<float>(rows * t.channels);
  s.product = memory.allocate<float>(rows * kLanes);
  s.top = memory.allocate<float>(rows * kLanes);
  return s;
}

template <class T>
TOKRED_INLINE const T* token_row(const ClusterTokens& t, int64_t item, int64_t token) {
  return static_cast<const T*>(t.x) + item * t.stride_batch + token * t.stride_token;
}
TOKRED_INLINE bool is_masked(const ClusterTokens& t, int64_t item, int64_t token) {
  return t.mask && !t.mask[item * t.mask_stride_batch + token * t.mask_stride_token];
}

// Scales a row to length 1; a zero row stays zero.
TOKRED_INLINE void normalise(float* row, int64_t channels) {
  const f32x16 scale = splat(inverse_norm(squared_norm(row, channels)));
  for (int64_t c = 0; c < channels; c += kLanes) {
    store_row(row + c, load_row(row + c, channels - c) * scale, channels - c);
  }
}

// What a centroid's product is added to, for the nearest to have the largest sum.
TOKRED_INLINE float centroid_offset(const float* centroid, int64_t channels, Metric metric) {
  return metric == Metric::l2 ? -0.5f * squared_norm(centroid, channels) : 0.0f;
}

// Puts up to sixteen centroids [count][C] into one panel.
TOKRED_INLINE void pack_centroids(const float* centroids, int64_t count, int64_t channels,
                                  float* panel) {
  if (count == kLanes) return transpose(centroids, kLanes, channels, panel);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      panel[c * kLanes + lane] = lane < count ? centroids[lane * channels + c] : 0.0f;
    }
  }
}

// The cluster of the largest of sixteen scores, the lowest of equals; -1 where none is finite.
TOKRED_INLINE int32_t best_cluster(f32x16 score, i32x16 panel) {
  const float best = max_lane(score);
  if (!(best - best == 0.0f)) return -1;
  int32_t number[kLanes];
  for (int32_t lane = 0; lane < kLanes; ++lane) number[lane] = lane;
  const i32x16 cluster = panel * splat(int32_t{kLanes}) + load(number);
  const f32x16 top = splat(best);
  const i32x16 last = splat(INT32_MAX);
  return min_lane(
      map<i32x16>([&](int i) { return score.r[i] == top.r[i] ? cluster.r[i] : last.r[i]; }));
}

// Tokens from `first` on as fp32, in rows `stride` apart; fp32 tokens where they are.
template <class T>
TOKRED_INLINE const float* token_rows(const ClusterTokens& t, int64_t item, int64_t first,
                                      int64_t count, const NearestScratch& s, int64_t& stride) {
  if constexpr (sizeof(T) == sizeof(float)) {
    stride = t.stride_token;
    return token_row<float>(t, item, first);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      pack_row(token_row<T>(t, item, first + i), t.channels, s.rows + i * t.channels);
    }
    stride = t.channels;
    return s.rows;
  }
}

// assignment[i] of `count` <= nearest_rows tokens from `first` on; returns the tokens as fp32, in
// rows `stride` apart.
template <class T>
TOKRED_INLINE const float* assign_nearest(const ClusterTokens& t, int64_t item, int64_t first,
                                          int64_t count, const CentroidPanels& panels,
                                          const NearestScratch& s, int32_t* assignment,
                                          int64_t& stride) {
  const float* rows = token_rows<T>(t, item, first, count, s, stride);
  for (int64_t i = 0; i < count; ++i) {
    store(s.best + i * kLanes, splat(-kInfinity<float>));
    store(s.panel + i * kLanes, splat(0));
  }
  const int64_t panel_size = t.channels * kLanes, all = divide_up(t.clusters, kLanes);
  for (int64_t p0 = 0; p0 < all; p0 += kTilePanels<float>) {
    multiply<Layout::row_step>(
        rows, stride, count, panels.lanes + p0 * panel_size, panel_size,
        min(all - p0, kTilePanels<float>), t.channels, [&](int64_t row, int panel, f32x16 dot) {
          const f32x16 score = dot + load(panels.offset + (p0 + panel) * kLanes);
          const f32x16 best = load(s.best + row * kLanes);
          const i32x16 number = splat(static_cast<int32_t>(p0 + panel));
          store(s.panel + row * kLanes,
                select_greater(score, best, number, load(s.panel + row * kLanes)));
          store(s.best + row * kLanes, select_greater(score, best, score, best));
        });
  }
  for (int64_t i = 0; i < count; ++i) {
    assignment[i] = is_masked(t, item, first + i)
                        ? -1
                        : best_cluster(load(s.best + i * kLanes), load(s.panel + i * kLanes));
  }
  return rows;
}

}  // namespace tokred::TOKRED_ISA
