// kmedoids: a round assigns tokens to medoids by the tiles of kmeans, sorts them by cluster, and
// sums the distances of every member to its cluster, 48 members by sixteen at a time. Distances are
// taken from differences, so near tokens lose no digits; the distances of a round are never stored.
//
// N = 588, K = 49, C = 512: 30 MFLOP to assign, and 3 C flops for each of N^2 / K pairs, 11 MFLOP.
#include "cluster/cpu/distance.h"
#include "cluster/cpu/nearest.h"
#include "common/cpu/parallel.h"

namespace tokred::TOKRED_ISA {
namespace {

enum class State : int32_t { moving, last_assignment, done };

constexpr int64_t kBlock = 192;  // tokens that a task assigns
constexpr int64_t kMembers = 48;  // members whose sums a task computes

// One batch item's memory.
struct Item {
  CentroidPanels panels;
  int32_t* medoid;  // [K] token numbers, -1 where there is no cluster
  int32_t* order;  // [N] tokens by cluster, each ascending
  int32_t* begin;  // [K + 1] where they begin in order
  float* cost;  // [N] by place in order: the sum of distances
  State* state;  // [1]
};

// One worker's memory.
struct Worker {
  NearestScratch nearest;
  float* rows;  // [kMembers][C]
  float* gather;  // [16][C]
  float* columns;  // [C][16]
  float* sums;  // [kMembers][16]
};

struct Rounds {
  const KmedoidsParams& p;
  int64_t blocks, panels, chunks;  // of an item

  explicit Rounds(const KmedoidsParams& p)
      : p(p), blocks(divide_up(p.tokens, kBlock)), panels(divide_up(p.clusters, kLanes)),
        chunks(divide_up(p.tokens, kMembers)) {}

  Item allocate(Workspace& memory) const {
    Item item;
    item.panels = allocate_panels(memory, p.clusters, p.channels);
    item.medoid = memory.allocate<int32_t>(p.clusters);
    item.order = memory.allocate<int32_t>(p.tokens);
    item.begin = memory.allocate<int32_t>(p.clusters + 1);
    item.cost = memory.allocate<float>(p.tokens);
    item.state = memory.allocate<State>(1);
    return item;
  }
  Worker allocate_worker(Workspace& memory) const {
    Worker w;
    w.nearest = allocate_nearest(memory, p);
    w.rows = memory.allocate<float>(kMembers * p.channels);
    w.gather = memory.allocate<float>(kLanes * p.channels);
    w.columns = memory.allocate<float>(kLanes * p.channels);
    w.sums = memory.allocate<float>(kMembers * kLanes);
    return w;
  }
  int64_t item_bytes() const {
    return workspace_bytes([&](Workspace& memory) { allocate(memory); });
  }
  int64_t worker_bytes() const {
    return workspace_bytes([&](Workspace& memory) { allocate_worker(memory); });
  }
  Item item(int64_t b) const {
    Workspace memory(static_cast<char*>(p.workspace) + b * item_bytes());
    return allocate(memory);
  }
  Worker worker(int64_t w) const {
    Workspace memory(static_cast<char*>(p.workspace) + p.batch * item_bytes() + w * worker_bytes());
    return allocate_worker(memory);
  }
};

// A token as fp32; of length 1 for cosine.
template <class T>
TOKRED_INLINE void pack_token(const Rounds& r, int64_t b, int64_t token, float* to) {
  pack_row(token_row<T>(r.p, b, token), r.p.channels, to);
  if (r.p.metric == Metric::cosine) normalise(to, r.p.channels);
}

// The medoids that there are; marks the tokens in `order`, so that none is taken twice.
template <class T>
void choose_start(const Rounds& r, int64_t b) {
  const KmedoidsParams& p = r.p;
  const Item item = r.item(b);
  for (int64_t i = 0; i < p.tokens; ++i) item.order[i] = 0;
  for (int64_t k = 0; k < p.clusters; ++k) {
    const int64_t token = p.start[b * p.start_stride_batch + k * p.start_stride_cluster];
    item.medoid[k] = -1;
    if (token < 0 || token >= p.tokens || is_masked(p, b, token) || item.order[token]) continue;
    const float squared = squared_norm(token_row<T>(p, b, token), p.channels);
    if (!(squared - squared == 0.0f)) continue;
    item.order[token] = 1;
    item.medoid[k] = static_cast<int32_t>(token);
  }
  *item.state = p.iterations > 0 ? State::moving : State::last_assignment;
}

template <class T>
void pack_medoids(const Rounds& r, int64_t b, int64_t panel, const Worker& w) {
  const KmedoidsParams& p = r.p;
  const Item item = r.item(b);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t k = panel * kLanes + lane;
    const int64_t token = k < p.clusters ? item.medoid[k] : -1;
    float* row = w.gather + lane * p.channels;
    if (token >= 0) {
      pack_token<T>(r, b, token, row);
    } else {
      for (int64_t c = 0; c < p.channels; ++c) row[c] = 0.0f;
    }
    item.panels.offset[k] =
        token >= 0 ? centroid_offset(row, p.channels, p.metric) : -kInfinity<float>;
  }
  pack_centroids(w.gather, kLanes, p.channels, item.panels.lanes + panel * kLanes * p.channels);
}

template <class T>
void assign_block(const Rounds& r, int64_t b, int64_t block, const Worker& w) {
  const int64_t last = min(r.p.tokens, (block + 1) * kBlock);
  const int64_t rows = nearest_rows(r.p.channels);
  for (int64_t i = block * kBlock; i < last; i += rows) {
    int64_t stride;
    assign_nearest<T>(r.p, b, i, min(last - i, rows), r.item(b).panels, w.nearest,
                      r.p.assignment + b * r.p.tokens + i, stride);
  }
}

// Gives the medoids to themselves, and sorts the tokens by cluster.
void list_members(const Rounds& r, int64_t b) {
  const KmedoidsParams& p = r.p;
  const Item item = r.item(b);
  int32_t* assignment = p.assignment + b * p.tokens;
  for (int64_t k = 0; k < p.clusters; ++k) {
    if (item.medoid[k] >= 0) assignment[item.medoid[k]] = static_cast<int32_t>(k);
  }
  if (*item.state != State::moving) return;
  int32_t* begin = item.begin;
  for (int64_t k = 0; k <= p.clusters; ++k) begin[k] = 0;
  for (int64_t i = 0; i < p.tokens; ++i) {
    if (assignment[i] >= 0) ++begin[assignment[i]];
  }
  // Ends of the clusters; filling from the back makes starts of them.
  for (int64_t k = 1; k <= p.clusters; ++k) begin[k] += begin[k - 1];
  for (int64_t i = p.tokens - 1; i >= 0; --i) {
    if (assignment[i] >= 0) item.order[--begin[assignment[i]]] = static_cast<int32_t>(i);
  }
}

TOKRED_INLINE f32x16 distances(f32x16 squared, Metric metric) {
  if (metric == Metric::cosine) return squared * splat(0.5f);
  float lane[kLanes];
  store(lane, squared);
  for (int i = 0; i < kLanes; ++i) lane[i] = __builtin_sqrtf(lane[i]);
  return load(lane);
}

// cost of the members [first, last) of a cluster whose members are [begin, end) of the order.
template <class T>
void sum_distances(const Rounds& r, int64_t b, int64_t begin, int64_t end, int64_t first,
                   int64_t last, const Worker& w) {
  const KmedoidsParams& p = r.p;
  const Item item = r.item(b);
  const int64_t count = last - first;
  for (int64_t i = 0; i < count; ++i) {
    pack_token<T>(r, b, item.order[first + i], w.rows + i * p.channels);
    store(w.sums + i * kLanes, splat(0.0f));
  }
  float number[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) number[lane] = static_cast<float>(lane);
  for (int64_t j = begin; j < end; j += kLanes) {
    const int64_t columns = min(end - j, kLanes);
    for (int64_t lane = 0; lane < columns; ++lane) {
      pack_token<T>(r, b, item.order[j + lane], w.gather + lane * p.channels);
    }
    pack_centroids(w.gather, columns, p.channels, w.columns);
    const f32x16 beyond = splat(static_cast<float>(columns));
    for (int64_t i0 = 0; i0 < count; i0 += kDistanceRows) {
      const float* row[kDistanceRows];
      for (int i = 0; i < kDistanceRows; ++i) row[i] = w.rows + min(i0 + i, count - 1) * p.channels;
      f32x16 squared[kDistanceRows];
      squared_distances(row, w.columns, p.channels, squared);
      for (int i = 0; i < min(count - i0, kDistanceRows); ++i) {
        float* sum = w.sums + (i0 + i) * kLanes;
        const f32x16 distance = distances(squared[i], p.metric);
        store(sum, load(sum) + select_greater(beyond, load(number), distance, splat(0.0f)));
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) item.cost[first + i] = sum(load(w.sums + i * kLanes));
}

// The costs of the members at kMembers places of the order, cluster by cluster.
template <class T>
void sum_chunk(const Rounds& r, int64_t b, int64_t chunk, const Worker& w) {
  const Item item = r.item(b);
  const int32_t* begin = item.begin;
  int64_t place = chunk * kMembers;
  const int64_t last = min(place + kMembers, begin[r.p.clusters]);
  if (place >= last) return;
  int64_t k = r.p.assignment[b * r.p.tokens + item.order[place]];
  for (; place < last; ++k) {
    const int64_t end = min(last, begin[k + 1]);
    if (place < end) sum_distances<T>(r, b, begin[k], begin[k + 1], place, end, w);
    place = max(place, end);
  }
}

// Moves the medoids of an item to the members of minimum cost; returns its state in the next round.
State move_medoids(const Rounds& r, int64_t b, int64_t round) {
  const Item item = r.item(b);
  bool moved = false;
  for (int64_t k = 0; k < r.p.clusters; ++k) {
    float smallest = kInfinity<float>;
    int32_t medoid = item.medoid[k];
    for (int64_t m = item.begin[k]; m < item.begin[k + 1]; ++m) {
      if (!(item.cost[m] < smallest)) continue;
      smallest = item.cost[m];
      medoid = item.order[m];
    }
    moved = moved || medoid != item.medoid[k];
    item.medoid[k] = medoid;
  }
  if (!moved) return State::done;
  return round + 1 >= r.p.iterations ? State::last_assignment : State::moving;
}

// Numbers the clusters by ascending medoids.
void write_results(const Rounds& r, int64_t b) {
  const KmedoidsParams& p = r.p;
  const Item item = r.item(b);
  int32_t* assignment = p.assignment + b * p.tokens;
  int32_t* number = item.begin;
  int32_t* owner = item.order;  // by token: the cluster whose medoid it is
  for (int64_t i = 0; i < p.tokens; ++i) owner[i] = -1;
  for (int64_t k = 0; k < p.clusters; ++k) {
    if (item.medoid[k] >= 0) owner[item.medoid[k]] = static_cast<int32_t>(k);
  }
  int32_t* medoids = p.medoids + b * p.clusters;
  int32_t count = 0;
  for (int64_t i = 0; i < p.tokens; ++i) {
    if (owner[i] < 0) continue;
    number[owner[i]] = count;
    medoids[count++] = static_cast<int32_t>(i);
  }
  for (int64_t k = count; k < p.clusters; ++k) medoids[k] = -1;
  for (int64_t i = 0; i < p.tokens; ++i) {
    if (assignment[i] >= 0) assignment[i] = number[assignment[i]];
  }
}

template <class T>
void kmedoids_all(const KmedoidsParams& p, const Parallel& parallel) {
  const Rounds r(p);
  const auto each = [&](int64_t parts, auto f) {
    parallel_tasks(parallel, p.batch * parts, [&](int64_t task, int64_t worker) {
      const int64_t b = task / parts;
      if (*r.item(b).state != State::done) f(b, task % parts, worker);
    });
  };
  parallel_tasks(parallel, p.batch, [&](int64_t b, int64_t) { choose_start<T>(r, b); });
  for (int64_t round = 0;; ++round) {
    each(r.panels, [&](int64_t b, int64_t panel, int64_t worker) {
      pack_medoids<T>(r, b, panel, r.worker(worker));
    });
    each(r.blocks, [&](int64_t b, int64_t block, int64_t worker) {
      assign_block<T>(r, b, block, r.worker(worker));
    });
    each(1, [&](int64_t b, int64_t, int64_t) { list_members(r, b); });
    each(r.chunks, [&](int64_t b, int64_t chunk, int64_t worker) {
      if (*r.item(b).state == State::moving) sum_chunk<T>(r, b, chunk, r.worker(worker));
    });
    bool all_done = true;
    for (int64_t b = 0; b < p.batch; ++b) {
      State& state = *r.item(b).state;
      state = state == State::moving ? move_medoids(r, b, round) : State::done;
      all_done = all_done && state == State::done;
    }
    if (all_done) break;
  }
  parallel_tasks(parallel, p.batch, [&](int64_t b, int64_t) { write_results(r, b); });
}

}  // namespace

int64_t kmedoids_workspace(const KmedoidsParams& p, const Parallel& parallel) {
  const Rounds r(p);
  return p.batch * r.item_bytes() + parallel.threads * r.worker_bytes();
}

void kmedoids(const KmedoidsParams& p, const Parallel& parallel) {
  visit_f32(p.dtype, [&]<class T>() { kmedoids_all<T>(p, parallel); });
}

}  // namespace tokred::TOKRED_ISA
