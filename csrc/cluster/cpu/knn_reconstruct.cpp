// knn_reconstruct: distances of 48 tokens to all centroids, sixteen at a time, the k nearest by
// insertion, and the weighted sum of their rows. Distances live in a task's memory only. Its
// gradient finds the neighbours in the same way, sorts them by centroid (counting, so tokens stay
// in order), and sums the rows that a centroid has.
//
// N = 4096, M = 256, C = D = 256: 0.8 GFLOP of distances; the sums read k rows a token.
#include "cluster/cpu/distance.h"
#include "cluster/params.h"
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "common/cpu/vexp.h"
#include "common/cpu/workspace.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr int64_t kTokens = 48;  // of a task

// One worker's memory.
struct Worker {
  float* rows;      // [kTokens][C]
  float* gather;    // [16][C]
  float* distance;  // [kTokens][panels * 16]
};

// The nearest centroids of one token, ascending.
struct Neighbours {
  int64_t count = 0;
  float weight[kMaxNeighbours];  // squared distances, then weights
  int32_t cluster[kMaxNeighbours];

  void insert(float distance, int32_t which, int64_t k) {
    if (!(distance < kInfinity<float>)) return;
    if (count == k && !(distance < weight[k - 1])) return;
    int64_t place = count < k ? count++ : k - 1;
    for (; place > 0 && distance < weight[place - 1]; --place) {
      weight[place] = weight[place - 1];
      cluster[place] = cluster[place - 1];
    }
    weight[place] = distance;
    cluster[place] = which;
  }

  void make_weights(float temperature, bool l2) {
    if (count == 0) return;
    const float smallest = weight[0];
    float total = 0.0f;
    for (int64_t j = 0; j < count; j += kLanes) {
      const f32x16 further = load_row(weight + j, count - j) - splat(smallest);
      store_row(weight + j, exp(splat(-temperature) * further), count - j);
    }
    for (int64_t j = 0; j < count; ++j) total += l2 ? weight[j] * weight[j] : weight[j];
    const float norm = l2 ? __builtin_sqrtf(total) : total;
    for (int64_t j = 0; j < count; ++j) weight[j] /= norm;
  }
};

struct Plan {
  const KnnReconstructParams& p;
  int64_t panels, blocks;  // of an item

  explicit Plan(const KnnReconstructParams& p)
      : p(p), panels(divide_up(p.clusters, kLanes)), blocks(divide_up(p.tokens, kTokens)) {}

  float* allocate_panels(Workspace& memory) const {
    return memory.allocate<float>(panels * kLanes * p.channels);
  }
  Worker allocate_worker(Workspace& memory) const {
    Worker w;
    w.rows = memory.allocate<float>(kTokens * p.channels);
    w.gather = memory.allocate<float>(kLanes * p.channels);
    w.distance = memory.allocate<float>(kTokens * panels * kLanes);
    return w;
  }
  int64_t item_bytes() const {
    return workspace_bytes([&](Workspace& memory) { allocate_panels(memory); });
  }
  int64_t worker_bytes() const {
    return workspace_bytes([&](Workspace& memory) { allocate_worker(memory); });
  }
  int64_t bytes(const Parallel& parallel) const {
    return p.batch * item_bytes() + parallel.threads * worker_bytes();
  }
  float* item(int64_t b) const {
    Workspace memory(static_cast<char*>(p.workspace) + b * item_bytes());
    return allocate_panels(memory);
  }
  Worker worker(int64_t w) const {
    Workspace memory(static_cast<char*>(p.workspace) + p.batch * item_bytes() + w * worker_bytes());
    return allocate_worker(memory);
  }
};

void pack_panel(const Plan& plan, int64_t b, int64_t panel, const Worker& w) {
  const KnnReconstructParams& p = plan.p;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t k = min(panel * kLanes + lane, p.clusters - 1);
    pack_row(p.centroids + b * p.centroid_stride_batch + k * p.centroid_stride_cluster, p.channels,
             w.gather + lane * p.channels);
  }
  transpose(w.gather, kLanes, p.channels, plan.item(b) + panel * kLanes * p.channels);
}

template <class T>
void measure_distances(const Plan& plan, int64_t b, int64_t first, int64_t count, const Worker& w) {
  const KnnReconstructParams& p = plan.p;
  const T* x = static_cast<const T*>(p.x) + b * p.stride_batch + first * p.stride_token;
  for (int64_t i = 0; i < count; ++i) {
    pack_row(x + i * p.stride_token, p.channels, w.rows + i * p.channels);
  }
  const float* columns = plan.item(b);
  for (int64_t panel = 0; panel < plan.panels; ++panel) {
    for (int64_t i0 = 0; i0 < count; i0 += kDistanceRows) {
      const float* row[kDistanceRows];
      for (int i = 0; i < kDistanceRows; ++i) {
        row[i] = w.rows + min(i0 + i, count - 1) * p.channels;
      }
      f32x16 squared[kDistanceRows];
      squared_distances(row, columns + panel * kLanes * p.channels, p.channels, squared);
      for (int i = 0; i < min(count - i0, kDistanceRows); ++i) {
        store(w.distance + ((i0 + i) * plan.panels + panel) * kLanes, squared[i]);
      }
    }
  }
}

template <class T>
void write_sum(const Plan& plan, int64_t b, int64_t i, const Neighbours& near) {
  const KnnReconstructParams& p = plan.p;
  const T* deep = static_cast<const T*>(p.deep) + b * p.deep_stride_batch;
  T* y = static_cast<T*>(p.y) + (b * p.tokens + i) * p.deep_channels;
  for (int64_t c = 0; c < p.deep_channels; c += kLanes) {
    const int64_t left = p.deep_channels - c;
    f32x16 total = splat(0.0f);
    for (int64_t j = 0; j < near.count; ++j) {
      const T* row = deep + near.cluster[j] * p.deep_stride_cluster + c;
      total = fma(splat(near.weight[j]), load_row(row, left), total);
    }
    store_row(y + c, total, left);
  }
}

// use(token, its neighbours) for the tokens of a block.
template <class T, class Use>
void each_token(const Plan& plan, int64_t b, int64_t block, const Worker& w, Use use) {
  const KnnReconstructParams& p = plan.p;
  const int64_t first = block * kTokens, count = min(p.tokens - first, kTokens);
  measure_distances<T>(plan, b, first, count, w);
  for (int64_t i = 0; i < count; ++i) {
    const float* distance = w.distance + i * plan.panels * kLanes;
    Neighbours near;
    for (int64_t m = 0; m < p.clusters; ++m) {
      near.insert(distance[m], static_cast<int32_t>(m), p.k);
    }
    near.make_weights(p.temperature, p.l2);
    use(first + i, near);
  }
}

// use(item, token, its neighbours) for every token.
template <class Use>
void each_token(const Plan& plan, const Parallel& parallel, Use use) {
  const KnnReconstructParams& p = plan.p;
  parallel_tasks(parallel, p.batch * plan.panels, [&](int64_t task, int64_t worker) {
    pack_panel(plan, task / plan.panels, task % plan.panels, plan.worker(worker));
  });
  parallel_tasks(parallel, p.batch * plan.blocks, [&](int64_t task, int64_t worker) {
    const int64_t b = task / plan.blocks;
    visit_f32(p.dtype, [&]<class T>() {
      each_token<T>(plan, b, task % plan.blocks, plan.worker(worker),
                    [&](int64_t i, const Neighbours& near) { use(b, i, near); });
    });
  });
}

// Gradient ---------------------------------------------------------------------------------------

struct Neighbour {
  int32_t cluster;  // -1 for none
  float weight;
};
struct Member {
  int32_t token;
  float weight;
};

// The neighbours of every token, and then the members of every centroid.
struct Members {
  Neighbour* neighbours;  // [B][N][k]
  Member* members;        // [B][N * k], by centroid and token
  int64_t* end;           // [B][M] of a centroid's members
};

Members allocate_members(Workspace& memory, const KnnReconstructParams& p) {
  Members m;
  m.neighbours = memory.allocate<Neighbour>(p.batch * p.tokens * p.k);
  m.members = memory.allocate<Member>(p.batch * p.tokens * p.k);
  m.end = memory.allocate<int64_t>(p.batch * p.clusters);
  return m;
}
int64_t members_bytes(const KnnReconstructParams& p) {
  return workspace_bytes([&](Workspace& memory) { allocate_members(memory, p); });
}

void sort_members(const KnnReconstructParams& p, int64_t b, const Members& m) {
  const int64_t entries = p.tokens * p.k;
  const Neighbour* neighbours = m.neighbours + b * entries;
  Member* members = m.members + b * entries;
  int64_t* end = m.end + b * p.clusters;
  for (int64_t j = 0; j < p.clusters; ++j) end[j] = 0;
  for (int64_t e = 0; e < entries; ++e) {
    if (neighbours[e].cluster >= 0) ++end[neighbours[e].cluster];
  }
  int64_t start = 0;
  for (int64_t j = 0; j < p.clusters; ++j) {
    const int64_t count = end[j];
    end[j] = start;
    start += count;
  }
  for (int64_t i = 0; i < p.tokens; ++i) {
    for (const Neighbour* n = neighbours + i * p.k; n < neighbours + (i + 1) * p.k; ++n) {
      if (n->cluster >= 0) members[end[n->cluster]++] = {static_cast<int32_t>(i), n->weight};
    }
  }
}

// kWide * 16 channels of a centroid's gradient, from channel c on.
template <int kWide, class D>
void sum_members(const KnnReconstructBackwardParams& p, int64_t b, const Member* from,
                 const Member* end, int64_t c, D* to) {
  const D* grad = static_cast<const D*>(p.grad_y) + b * p.grad_stride_batch + c;
  const int64_t left = p.forward.deep_channels - c;
  f32x16 total[kWide];
  for (f32x16& t : total) t = splat(0.0f);
  for (; from < end; ++from) {
    const D* row = grad + from->token * p.grad_stride_token;
    const f32x16 weight = splat(from->weight);
    for (int v = 0; v < kWide; ++v) {
      total[v] = fma(weight, load_row(row + v * kLanes, left - v * kLanes), total[v]);
    }
  }
  for (int v = 0; v < kWide; ++v) store_row(to + c + v * kLanes, total[v], left - v * kLanes);
}

template <class D>
void write_gradient(const KnnReconstructBackwardParams& p, int64_t b, int64_t j, const Members& m) {
  const KnnReconstructParams& f = p.forward;
  const int64_t* end = m.end + b * f.clusters;
  const Member* members = m.members + b * f.tokens * f.k;
  const Member *first = members + (j > 0 ? end[j - 1] : 0), *last = members + end[j];
  D* to = static_cast<D*>(p.grad_deep) + (b * f.clusters + j) * f.deep_channels;
  int64_t c = 0;
  for (; c + 4 * kLanes <= f.deep_channels; c += 4 * kLanes)
    sum_members<4>(p, b, first, last, c, to);
  for (; c < f.deep_channels; c += kLanes) sum_members<1>(p, b, first, last, c, to);
}

}  // namespace

int64_t knn_reconstruct_workspace(const KnnReconstructParams& p, const Parallel& parallel) {
  return Plan(p).bytes(parallel);
}

void knn_reconstruct(const KnnReconstructParams& p, const Parallel& parallel) {
  const Plan plan(p);
  each_token(plan, parallel, [&](int64_t b, int64_t i, const Neighbours& near) {
    visit_f32(p.deep_dtype, [&]<class D>() { write_sum<D>(plan, b, i, near); });
  });
}

int64_t knn_reconstruct_backward_workspace(const KnnReconstructBackwardParams& p,
                                           const Parallel& parallel) {
  return members_bytes(p.forward) + Plan(p.forward).bytes(parallel);
}

void knn_reconstruct_backward(const KnnReconstructBackwardParams& p, const Parallel& parallel) {
  KnnReconstructParams f = p.forward;
  f.workspace = static_cast<char*>(p.workspace) + members_bytes(f);
  Workspace memory(p.workspace);
  const Members m = allocate_members(memory, f);
  each_token(Plan(f), parallel, [&](int64_t b, int64_t i, const Neighbours& near) {
    Neighbour* to = m.neighbours + (b * f.tokens + i) * f.k;
    for (int64_t n = 0; n < f.k; ++n) {
      to[n] = n < near.count ? Neighbour{near.cluster[n], near.weight[n]} : Neighbour{-1, 0.0f};
    }
  });
  parallel_tasks(parallel, f.batch, [&](int64_t b, int64_t) { sort_members(f, b, m); });
  parallel_tasks(parallel, f.batch * f.clusters, [&](int64_t task, int64_t) {
    visit_f32(f.deep_dtype,
              [&]<class D>() { write_gradient<D>(p, task / f.clusters, task % f.clusters, m); });
  });
}

}  // namespace tokred::TOKRED_ISA
