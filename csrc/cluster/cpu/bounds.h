// Which groups of centroids cannot hold a token's nearest one: Yinyang k-means (Ding et al., ICML
// 2015). A bound is below the distance of a token to every centroid of a group; when centroids
// move, it falls by the longest move of the group, and where it stays above the distance to the
// token's own centroid, the group is skipped. Bounds allow for the rounding of the products, so the
// assignment is the one that all products give.
#pragma once

#include "cluster/cpu/nearest.h"

namespace tokred::TOKRED_ISA {

inline constexpr int64_t kMaxBoundGroups = 16;

// How tokens and centroids are cut.
struct BoundShape {
  int64_t panels;  // of a group
  int64_t groups;
  int64_t chunks;  // of a block of tokens
  int64_t rows;  // of a chunk

  BoundShape(int64_t clusters, int64_t channels, int64_t block) {
    const int64_t all = divide_up(clusters, kLanes);
    panels = max(1, divide_up(all, kMaxBoundGroups));
    groups = divide_up(all, panels);
    rows = nearest_rows(channels);
    chunks = divide_up(block, rows);
  }
  int64_t numbers_of_block() const { return chunks * groups * rows; }
};

// The bounds of one item.
struct Bounds {
  float* below;  // [blocks][chunks][groups][rows]
  float* fall;  // [groups] what the last move takes from the bounds of a group
  float* largest;  // [1] an upper bound of the lengths of all centroids
};

// Several times what rounding may add to twice a score x . c - |c|^2 / 2: a product of C numbers is
// off by at most C half ulps of the product of the lengths. The last term covers underflow.
TOKRED_INLINE float score_slack(float squared, float largest, int64_t channels) {
  const float unit = static_cast<float>(channels + 16) * 0x1p-24f;
  const float length = __builtin_sqrtf(squared);
  return 8.0f * unit * (length * largest + 0.5f * largest * largest + squared) + 1e-30f;
}

// A lower bound of the distance to a centroid of a score up to `best`.
TOKRED_INLINE float bound_below(float squared, float best, float slack) {
  const float distance = squared - 2.0f * best - slack;
  return distance > 0.0f ? __builtin_sqrtf(distance) * (1.0f - 0x1p-20f) : 0.0f;
}
// An upper bound of the distance to the centroid of that score.
TOKRED_INLINE float bound_above(float squared, float score, float slack) {
  const float distance = squared - 2.0f * score;
  return __builtin_sqrtf((distance > 0.0f ? distance : 0.0f) + slack) * (1.0f + 0x1p-20f);
}
// What the bounds of a group lose where the squared moves of its centroids are at most `way`.
TOKRED_INLINE float bound_fall(float way) { return __builtin_sqrtf(way) * 1.0001f + 1e-18f; }

// The same as assign_nearest, for a chunk whose bounds are `below` [groups][rows]. Where they are
// not `known` yet, all products are formed, and bounds made of them; else the assignment is that of
// the last round, and `centroids` [K][C] have moved since.
template <class T>
TOKRED_INLINE const float* assign_bounded(const ClusterTokens& t, int64_t item, int64_t first,
                                          int64_t count, const CentroidPanels& panels,
                                          const float* centroids, const BoundShape& shape,
                                          const Bounds& bounds, float* below, bool known,
                                          const NearestScratch& s, int32_t* assignment,
                                          int64_t& stride) {
  const float* rows = token_rows<T>(t, item, first, count, s, stride);
  for (int64_t i = 0; i < count; ++i) {
    store(s.best + i * kLanes, splat(-kInfinity<float>));
    store(s.panel + i * kLanes, splat(0));
    const float* row = rows + i * stride;
    s.squared[i] = squared_norm(row, t.channels);
    s.slack[i] = score_slack(s.squared[i], *bounds.largest, t.channels);
    s.limit[i] = kInfinity<float>;
    if (is_masked(t, item, first + i)) {
      s.limit[i] = -kInfinity<float>;  // below every bound
    } else if (known && assignment[i] >= 0) {
      const int64_t own = assignment[i];
      const float score =
          dot_row(row, centroids + own * t.channels, t.channels) + panels.offset[own];
      s.limit[i] = bound_above(s.squared[i], score, s.slack[i]);
    }
  }
  const int64_t panel_size = t.channels * kLanes, all = divide_up(t.clusters, kLanes);
  for (int64_t g = 0; g < shape.groups; ++g) {
    float* bound = below + g * shape.rows;
    if (known) {
      const f32x16 keep = splat(1.0f - 0x1p-22f), fall = splat(bounds.fall[g]);
      for (int64_t i = 0; i < shape.rows; i += kLanes) {
        store(bound + i, load(bound + i) * keep - fall);
      }
    }
    int64_t needed = 0;
    for (int64_t i = 0; i < count; ++i) {
      s.row[needed] = static_cast<int32_t>(i);
      needed += !(known && bound[i] > s.limit[i]);
    }
    const float* left = rows;
    int64_t left_stride = stride;
    if (needed < count) {
      for (int64_t at = 0; at < needed; ++at) {
        pack_row(rows + s.row[at] * stride, t.channels, s.gathered + at * t.channels);
      }
      left = s.gathered;
      left_stride = t.channels;
    }
    const int64_t last = min(all, (g + 1) * shape.panels);
    for (int64_t panel = g * shape.panels; panel < last; ++panel) {
      multiply<Layout::row_step>(
          left, left_stride, needed, panels.lanes + panel * panel_size, panel_size, 1, t.channels,
          [&](int64_t at, int, f32x16 dot) { store(s.product + at * kLanes, dot); });
      const f32x16 offset = load(panels.offset + panel * kLanes);
      const i32x16 number = splat(static_cast<int32_t>(panel));
      const bool opens = panel == g * shape.panels;
      for (int64_t at = 0; at < needed; ++at) {
        const int64_t lanes = s.row[at] * int64_t{kLanes};
        const f32x16 score = load(s.product + at * kLanes) + offset;
        const f32x16 best = load(s.best + lanes);
        store(s.panel + lanes, select_greater(score, best, number, load(s.panel + lanes)));
        store(s.best + lanes, max(score, best));
        float* top = s.top + at * kLanes;
        store(top, max(score, opens ? splat(-kInfinity<float>) : load(top)));
      }
    }
    for (int64_t at = 0; at < needed; ++at) {
      const int64_t row = s.row[at];
      bound[row] = bound_below(s.squared[row], max_lane(load(s.top + at * kLanes)), s.slack[row]);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    assignment[i] = is_masked(t, item, first + i)
                        ? -1
                        : best_cluster(load(s.best + i * kLanes), load(s.panel + i * kLanes));
  }
  return rows;
}

}  // namespace tokred::TOKRED_ISA
