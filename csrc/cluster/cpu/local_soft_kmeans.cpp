// local_soft_kmeans: every token's weights on the centroids around it, then every centroid's sum
// over the tokens around it; owner computes, in the order of the grid, so nothing depends on
// threads. Weights are stored, (2 radius + 1)^2 a token; distances are not.
//
// H W = 4096, C = 256, window 7: 5 C flops for each of 49 pairs a token and iteration, 0.26 GFLOP.
#include "cluster/cpu/nearest.h"
#include "common/cpu/parallel.h"
#include "common/cpu/vexp.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr int64_t kBlock = 192;  // tokens that a task assigns

// One batch item's memory.
struct Item {
  CentroidPanels panels;
  bool* usable;   // [N]
  float* weight;  // [N][window][window], by place relative to the token's cell
};

struct Grid {
  const LocalSoftKmeansParams& p;
  int64_t side, window, blocks, panels;

  explicit Grid(const LocalSoftKmeansParams& p)
      : p(p), side(2 * p.radius + 1), window(side * side), blocks(divide_up(p.tokens, kBlock)),
        panels(divide_up(p.clusters, kLanes)) {}

  Item allocate(Workspace& memory) const {
    Item item;
    item.panels = allocate_panels(memory, p.clusters, p.channels);
    item.usable = memory.allocate<bool>(p.tokens);
    item.weight = memory.allocate<float>(p.tokens * window);
    return item;
  }
  int64_t item_bytes() const {
    return workspace_bytes([&](Workspace& memory) { allocate(memory); });
  }
  int64_t worker_bytes() const {
    return workspace_bytes([&](Workspace& memory) { allocate_nearest(memory, p); });
  }
  Item item(int64_t b) const {
    Workspace memory(static_cast<char*>(p.workspace) + b * item_bytes());
    return allocate(memory);
  }
  NearestScratch worker(int64_t w) const {
    Workspace memory(static_cast<char*>(p.workspace) + p.batch * item_bytes() + w * worker_bytes());
    return allocate_nearest(memory, p);
  }
  float* centroid(int64_t b, int64_t k) const {
    return p.centroids + (b * p.clusters + k) * p.channels;
  }
};

// total += w * row, of all channels.
template <class T>
TOKRED_INLINE void add_row(float* total, const T* row, float w, int64_t channels) {
  const f32x16 factor = splat(w);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t left = channels - c;
    store_row(total + c, fma(load_row(row + c, left), factor, load_row(total + c, left)), left);
  }
}
TOKRED_INLINE void divide_row(float* total, float divisor, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) total[c] /= divisor;
}

template <class T>
void mark_usable(const Grid& g, int64_t b, int64_t y) {
  const LocalSoftKmeansParams& p = g.p;
  bool* usable = g.item(b).usable;
  for (int64_t i = y * p.width; i < (y + 1) * p.width; ++i) {
    const float squared = squared_norm(token_row<T>(p, b, i), p.channels);
    usable[i] = squared - squared == 0.0f;
  }
}

template <class T>
void pool_centroid(const Grid& g, int64_t b, int64_t k) {
  const LocalSoftKmeansParams& p = g.p;
  const bool* usable = g.item(b).usable;
  float* total = g.centroid(b, k);
  for (int64_t c = 0; c < p.channels; ++c) total[c] = 0.0f;
  const GridRange rows = pooled_tokens(k / p.columns, p.rows, p.height);
  const GridRange columns = pooled_tokens(k % p.columns, p.columns, p.width);
  int64_t count = 0;
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    for (int64_t x = columns.begin; x < columns.end; ++x) {
      const int64_t i = y * p.width + x;
      if (!usable[i]) continue;
      add_row(total, token_row<T>(p, b, i), 1.0f, p.channels);
      ++count;
    }
  }
  if (count > 0) divide_row(total, static_cast<float>(count), p.channels);
}

template <class T>
TOKRED_INLINE float squared_distance(const T* x, const float* y, int64_t channels) {
  f32x16 total = splat(0.0f);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const f32x16 difference = load_row(x + c, channels - c) - load_row(y + c, channels - c);
    total = fma(difference, difference, total);
  }
  return sum(total);
}

// The weights of one token; 0 outside the grid of centroids, and of a token that is not finite.
template <class T>
void weigh_token(const Grid& g, int64_t b, int64_t y, int64_t x) {
  const LocalSoftKmeansParams& p = g.p;
  const Item item = g.item(b);
  const int64_t i = y * p.width + x;
  float* weight = item.weight + i * g.window;
  for (int64_t j = 0; j < g.window; ++j) weight[j] = kInfinity<float>;
  const int64_t row = y * p.rows / p.height, column = x * p.columns / p.width;
  const T* token = token_row<T>(p, b, i);
  float smallest = kInfinity<float>;
  for (int64_t j = 0; item.usable[i] && j < g.window; ++j) {
    const int64_t r = row + j / g.side - p.radius, s = column + j % g.side - p.radius;
    if (r < 0 || r >= p.rows || s < 0 || s >= p.columns) continue;
    const float distance = squared_distance(token, g.centroid(b, r * p.columns + s), p.channels);
    if (distance < kInfinity<float>) weight[j] = distance;
    if (distance < smallest) smallest = distance;
  }
  for (int64_t j = 0; j < g.window; j += kLanes) {
    const f32x16 distance = load_row(weight + j, g.window - j);
    const f32x16 power = splat(-p.temperature) * (distance - splat(smallest));
    const f32x16 there = select_greater(splat(kInfinity<float>), distance, exp(power), splat(0.0f));
    store_row(weight + j, there, g.window - j);
  }
  float total = 0.0f;
  for (int64_t j = 0; j < g.window; ++j) total += weight[j];
  for (int64_t j = 0; total > 0.0f && j < g.window; ++j) weight[j] /= total;
}

template <class T>
void move_centroid(const Grid& g, int64_t b, int64_t k) {
  constexpr int64_t kStep = 4 * kLanes;  // channels summed in registers at a time
  const LocalSoftKmeansParams& p = g.p;
  const Item item = g.item(b);
  const int64_t r = k / p.columns, s = k % p.columns;
  const GridRange rows = tokens_around(r, p.radius, p.rows, p.height);
  const GridRange columns = tokens_around(s, p.radius, p.columns, p.width);
  // f(token number, weight on this centroid) for every token that has one.
  const auto each = [&](auto f) {
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const int64_t down = r - y * p.rows / p.height + p.radius;
      for (int64_t x = columns.begin; x < columns.end; ++x) {
        const int64_t right = s - x * p.columns / p.width + p.radius, i = y * p.width + x;
        const float w = item.weight[i * g.window + down * g.side + right];
        if (w != 0.0f) f(i, w);
      }
    }
  };
  float total = 0.0f;
  each([&](int64_t, float w) { total += w; });
  if (total == 0.0f) return;
  const float divisor = total > 1e-16f ? total : 1e-16f;
  float* centroid = g.centroid(b, k);
  for (int64_t c = 0; c < p.channels; c += kStep) {
    const int64_t left = p.channels - c;
    f32x16 sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    each([&](int64_t i, float w) {
      const T* token = token_row<T>(p, b, i) + c;
      for (int n = 0; n < 4 && n * kLanes < left; ++n) {
        sums[n] = fma(load_row(token + n * kLanes, left - n * kLanes), splat(w), sums[n]);
      }
    });
    for (int n = 0; n < 4 && n * kLanes < left; ++n) {
      store_row(centroid + c + n * kLanes, sums[n] / splat(divisor), left - n * kLanes);
    }
  }
}

void pack_panel(const Grid& g, int64_t b, int64_t panel) {
  const LocalSoftKmeansParams& p = g.p;
  const CentroidPanels panels = g.item(b).panels;
  const int64_t k0 = panel * kLanes, count = min(p.clusters - k0, kLanes);
  pack_centroids(g.centroid(b, k0), count, p.channels, panels.lanes + k0 * p.channels);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    panels.offset[k0 + lane] = lane < count
                                   ? centroid_offset(g.centroid(b, k0 + lane), p.channels, p.metric)
                                   : -kInfinity<float>;
  }
}

template <class T>
void assign_block(const Grid& g, int64_t b, int64_t block, const NearestScratch& scratch) {
  const int64_t last = min(g.p.tokens, (block + 1) * kBlock), rows = nearest_rows(g.p.channels);
  for (int64_t i = block * kBlock; i < last; i += rows) {
    int64_t stride;
    assign_nearest<T>(g.p, b, i, min(last - i, rows), g.item(b).panels, scratch,
                      g.p.assignment + b * g.p.tokens + i, stride);
  }
}

template <class T>
void local_soft_kmeans_all(const LocalSoftKmeansParams& p, const Parallel& parallel) {
  const Grid g(p);
  // f(batch item, part, worker) for so many parts of every item.
  const auto each = [&](int64_t parts, auto f) {
    parallel_tasks(parallel, p.batch * parts,
                   [&](int64_t task, int64_t worker) { f(task / parts, task % parts, worker); });
  };
  each(p.height, [&](int64_t b, int64_t y, int64_t) { mark_usable<T>(g, b, y); });
  each(p.clusters, [&](int64_t b, int64_t k, int64_t) { pool_centroid<T>(g, b, k); });
  for (int64_t round = 0; p.clusters > 0 && round < p.iterations; ++round) {
    each(p.height, [&](int64_t b, int64_t y, int64_t) {
      for (int64_t x = 0; x < p.width; ++x) weigh_token<T>(g, b, y, x);
    });
    each(p.clusters, [&](int64_t b, int64_t k, int64_t) { move_centroid<T>(g, b, k); });
  }
  each(g.panels, [&](int64_t b, int64_t panel, int64_t) { pack_panel(g, b, panel); });
  each(g.blocks, [&](int64_t b, int64_t block, int64_t worker) {
    assign_block<T>(g, b, block, g.worker(worker));
  });
}

}  // namespace

int64_t local_soft_kmeans_workspace(const LocalSoftKmeansParams& p, const Parallel& parallel) {
  const Grid g(p);
  return p.batch * g.item_bytes() + parallel.threads * g.worker_bytes();
}

void local_soft_kmeans(const LocalSoftKmeansParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() { local_soft_kmeans_all<T>(p, parallel); });
}

}  // namespace tokred::TOKRED_ISA
