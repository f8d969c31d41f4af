// kmeans: Lloyd's algorithm. A task gives a block of tokens to their nearest centroids and adds the
// tokens, still in the cache, to sums of its own; the sums of the blocks are added in order, so
// that results depend on neither threads nor batch.
//
// [1, 65536, 64], K = 256: 2.1 GFLOP a round over 17 MB of tokens, so the floor is the fp32 FMA
// rate: 24 ms at 90 GFLOP/s. The sums are 4 MFLOP.
#include "cluster/cpu/bounds.h"
#include "common/cpu/parallel.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr int64_t kFewestGroups = 4;

enum class State : int32_t { moving, last_assignment, done };

// One batch item's memory.
struct Item {
  CentroidPanels panels;
  float* way;  // [panels] the largest squared move of a panel's centroids
  float* length;  // [panels] the largest squared length
  int32_t* start;  // [K] token numbers of the start
  float* sums;  // [blocks][K][C]
  int32_t* counts;  // [blocks][K]
  State* state;  // [1]
  Bounds bounds;  // of l2
};

struct Rounds {
  const KmeansParams& p;
  int64_t block, blocks, panels;  // tokens of a block; blocks and panels of an item
  BoundShape shape;
  bool bounded;  // whether there are enough groups and rounds for bounds to pay

  explicit Rounds(const KmeansParams& p)
      : p(p), block(kmeans_block(p.clusters)), blocks(divide_up(p.tokens, block)),
        panels(divide_up(p.clusters, kLanes)), shape(p.clusters, p.channels, block),
        bounded(p.metric == Metric::l2 && shape.groups >= kFewestGroups && p.iterations > 2) {}

  Item allocate(Workspace& memory) const {
    Item item;
    item.panels = allocate_panels(memory, p.clusters, p.channels);
    item.way = memory.allocate<float>(panels);
    item.length = memory.allocate<float>(panels);
    item.start = memory.allocate<int32_t>(p.clusters);
    item.sums = memory.allocate<float>(blocks * p.clusters * p.channels);
    item.counts = memory.allocate<int32_t>(blocks * p.clusters);
    item.state = memory.allocate<State>(1);
    item.bounds.below = memory.allocate<float>(bounded ? blocks * shape.numbers_of_block() : 0);
    item.bounds.fall = memory.allocate<float>(shape.groups);
    item.bounds.largest = memory.allocate<float>(1);
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

// The tokens that the centroids start at; -1 where there is none.
void choose_start(const Rounds& r, int64_t b) {
  const KmeansParams& p = r.p;
  int32_t* start = r.item(b).start;
  if (p.start_token) {
    for (int64_t k = 0; k < p.clusters; ++k) {
      const int64_t token = p.start_token[b * p.start_stride_batch + k * p.start_stride_cluster];
      const bool usable = token >= 0 && token < p.tokens && !is_masked(p, b, token);
      start[k] = usable ? static_cast<int32_t>(token) : -1;
    }
    return;
  }
  int64_t usable = 0;
  for (int64_t i = 0; i < p.tokens; ++i) usable += !is_masked(p, b, i);
  int64_t passed = 0, token = 0;  // `passed` usable tokens stand before `token`
  for (int64_t k = 0; k < p.clusters; ++k) {
    start[k] = -1;
    if (usable == 0) continue;
    const int64_t rank = (2 * k + 1) * usable / (2 * p.clusters);
    for (;; ++token) {
      if (is_masked(p, b, token)) continue;
      if (passed == rank) break;
      ++passed;
    }
    start[k] = static_cast<int32_t>(token);
  }
}

void pack_panel(const Rounds& r, int64_t b, int64_t panel, const Item& item) {
  const KmeansParams& p = r.p;
  const int64_t k0 = panel * kLanes, count = min(p.clusters - k0, kLanes);
  pack_centroids(r.centroid(b, k0), count, p.channels, item.panels.lanes + k0 * p.channels);
  float longest = 0.0f;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const bool usable = lane < count && (p.start || item.start[k0 + lane] >= 0);
    const float offset = usable ? centroid_offset(r.centroid(b, k0 + lane), p.channels, p.metric)
                                : -kInfinity<float>;
    item.panels.offset[k0 + lane] = offset;
    // A centroid that is not finite gets no token.
    if (offset > -kInfinity<float> && -2.0f * offset > longest) longest = -2.0f * offset;
  }
  item.length[panel] = longest;
}

template <class T>
void start_panel(const Rounds& r, int64_t b, int64_t panel) {
  const KmeansParams& p = r.p;
  const Item item = r.item(b);
  for (int64_t k = panel * kLanes; k < min(p.clusters, (panel + 1) * kLanes); ++k) {
    float* to = r.centroid(b, k);
    if (p.start) {
      pack_row(p.start + b * p.start_stride_batch + k * p.start_stride_cluster, p.channels, to);
    } else if (item.start[k] >= 0) {
      pack_row(token_row<T>(p, b, item.start[k]), p.channels, to);
    } else {
      for (int64_t c = 0; c < p.channels; ++c) to[c] = 0.0f;
    }
    if (p.metric == Metric::cosine) normalise(to, p.channels);
  }
  pack_panel(r, b, panel, item);
}

// sum = row (of a first token) or sum + row, stretched by `scale`.
TOKRED_INLINE void add_token(const float* row, float scale, bool first, int64_t channels,
                             float* sum) {
  const f32x16 factor = splat(scale);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t left = channels - c;
    const f32x16 before = first ? splat(0.0f) : load_row(sum + c, left);
    store_row(sum + c, fma(load_row(row + c, left), factor, before), left);
  }
}

template <class T>
void assign_block(const Rounds& r, int64_t b, int64_t block, int64_t round,
                  const NearestScratch& scratch) {
  const KmeansParams& p = r.p;
  const Item item = r.item(b);
  int32_t* counts = item.counts + block * p.clusters;
  float* sums = item.sums + block * p.clusters * p.channels;
  for (int64_t k = 0; k < p.clusters; ++k) counts[k] = 0;
  const int64_t first = block * r.block, last = min(p.tokens, first + r.block);
  for (int64_t i0 = first; i0 < last; i0 += r.shape.rows) {
    const int64_t count = min(last - i0, r.shape.rows);
    int32_t* assignment = p.assignment + b * p.tokens + i0;
    int64_t stride;
    const float* rows;
    if (r.bounded && round > 0) {  // the first move is too far for bounds
      const int64_t chunk = (i0 - first) / r.shape.rows;
      float* below = item.bounds.below + block * r.shape.numbers_of_block() +
                     chunk * r.shape.groups * r.shape.rows;
      rows = assign_bounded<T>(p, b, i0, count, item.panels, r.centroid(b, 0), r.shape, item.bounds,
                               below, round > 1, scratch, assignment, stride);
    } else {
      rows = assign_nearest<T>(p, b, i0, count, item.panels, scratch, assignment, stride);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = assignment[i];
      if (k < 0) continue;
      const bool first = counts[k]++ == 0;
      if (*item.state != State::moving) continue;
      const float* row = rows + i * stride;
      const float scale =
          p.metric == Metric::cosine ? inverse_norm(squared_norm(row, p.channels)) : 1.0f;
      add_token(row, scale, first, p.channels, sums + k * p.channels);
    }
  }
}

int64_t cluster_count(const Rounds& r, const Item& item, int64_t k) {
  int64_t count = 0;
  for (int64_t block = 0; block < r.blocks; ++block) count += item.counts[block * r.p.clusters + k];
  return count;
}

// Moves one centroid to the mean of its tokens; returns the squared length of the move.
float move_centroid(const Rounds& r, int64_t b, int64_t k, const Item& item) {
  const KmeansParams& p = r.p;
  const int64_t count = cluster_count(r, item, k);
  if (count == 0) return 0.0f;
  float* centroid = r.centroid(b, k);
  const auto total = [&](int64_t c) {
    f32x16 sum = splat(0.0f);
    for (int64_t block = 0; block < r.blocks; ++block) {
      const int64_t at = block * p.clusters + k;
      if (item.counts[at] == 0) continue;
      sum = sum + load_row(item.sums + at * p.channels + c, p.channels - c);
    }
    return sum;
  };
  f32x16 factor = splat(1.0f);
  const f32x16 divisor = splat(static_cast<float>(count));
  if (p.metric == Metric::cosine) {
    f32x16 squared = splat(0.0f);
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      const f32x16 sum = total(c);
      squared = fma(sum, sum, squared);
    }
    factor = splat(inverse_norm(sum(squared)));
  }
  f32x16 way = splat(0.0f);
  for (int64_t c = 0; c < p.channels; c += kLanes) {
    const int64_t left = p.channels - c;
    const f32x16 next = p.metric == Metric::cosine ? total(c) * factor : total(c) / divisor;
    const f32x16 step = next - load_row(centroid + c, left);
    way = fma(step, step, way);
    store_row(centroid + c, next, left);
  }
  return sum(way);
}

void move_panel(const Rounds& r, int64_t b, int64_t panel) {
  const Item item = r.item(b);
  float furthest = 0.0f;
  for (int64_t k = panel * kLanes; k < min(r.p.clusters, (panel + 1) * kLanes); ++k) {
    const float way = move_centroid(r, b, k, item);
    // A move of NaN counts as infinite.
    furthest = way <= furthest ? furthest : way == way ? way : kInfinity<float>;
  }
  item.way[panel] = furthest;
  pack_panel(r, b, panel, item);
}

// What the bounds need of the centroids that have moved.
void measure_moves(const Rounds& r, const Item& item) {
  float longest = 0.0f;
  for (int64_t g = 0; g < r.shape.groups; ++g) {
    float way = 0.0f;
    for (int64_t panel = g * r.shape.panels; panel < min(r.panels, (g + 1) * r.shape.panels);
         ++panel) {
      if (item.way[panel] > way) way = item.way[panel];
      if (item.length[panel] > longest) longest = item.length[panel];
    }
    item.bounds.fall[g] = bound_fall(way);
  }
  *item.bounds.largest = __builtin_sqrtf(longest) * 1.0001f;
}

// What an item does in the next round.
State next_state(const Rounds& r, const Item& item, int64_t round) {
  if (*item.state != State::moving) return State::done;
  float furthest = 0.0f;
  for (int64_t panel = 0; panel < r.panels; ++panel) {
    if (item.way[panel] > furthest) furthest = item.way[panel];
  }
  if (r.bounded) measure_moves(r, item);
  if (furthest == 0.0f) return State::done;  // the last assignment was to these very centroids
  const bool stays = furthest <= r.p.tolerance * r.p.tolerance;
  return stays || round + 1 >= r.p.iterations ? State::last_assignment : State::moving;
}

template <class T>
void kmeans_all(const KmeansParams& p, const Parallel& parallel) {
  const Rounds r(p);
  parallel_tasks(parallel, p.batch, [&](int64_t b, int64_t) {
    if (!p.start) choose_start(r, b);
    *r.item(b).state = p.iterations > 0 ? State::moving : State::last_assignment;
  });
  parallel_tasks(parallel, p.batch * r.panels, [&](int64_t task, int64_t) {
    start_panel<T>(r, task / r.panels, task % r.panels);
  });
  for (int64_t round = 0;; ++round) {
    parallel_tasks(parallel, p.batch * r.blocks, [&](int64_t task, int64_t worker) {
      if (*r.item(task / r.blocks).state == State::done) return;
      assign_block<T>(r, task / r.blocks, task % r.blocks, round, r.worker(worker));
    });
    parallel_tasks(parallel, p.batch * r.panels, [&](int64_t task, int64_t) {
      if (*r.item(task / r.panels).state != State::moving) return;
      move_panel(r, task / r.panels, task % r.panels);
    });
    bool all_done = true;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Item item = r.item(b);
      *item.state = next_state(r, item, round);
      all_done = all_done && *item.state == State::done;
    }
    if (all_done) break;
  }
  parallel_tasks(parallel, p.batch, [&](int64_t b, int64_t) {
    for (int64_t k = 0; k < p.clusters; ++k) {
      p.counts[b * p.clusters + k] = static_cast<int32_t>(cluster_count(r, r.item(b), k));
    }
  });
}

}  // namespace

int64_t kmeans_workspace(const KmeansParams& p, const Parallel& parallel) {
  const Rounds r(p);
  return p.batch * r.item_bytes() + parallel.threads * r.worker_bytes();
}

void kmeans(const KmeansParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() { kmeans_all<T>(p, parallel); });
}

}  // namespace tokred::TOKRED_ISA
