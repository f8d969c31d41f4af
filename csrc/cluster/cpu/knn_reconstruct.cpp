// knn_reconstruct: distances of 48 tokens to all centroids, sixteen at a time, the k nearest by
// insertion, and the weighted sum of their rows. Distances live in a task's memory only.
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
  float weight[kMostNeighbours];  // squared distances, then weights
  int32_t cluster[kMostNeighbours];

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
    const float least = weight[0];
    float total = 0.0f;
    for (int64_t j = 0; j < count; j += kLanes) {
      const f32x16 further = load_row(weight + j, count - j) - splat(least);
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

template <class T>
void reconstruct_block(const Plan& plan, int64_t b, int64_t block, const Worker& w) {
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
    visit_f32(p.deep_dtype, [&]<class D>() { write_sum<D>(plan, b, first + i, near); });
  }
}

}  // namespace

int64_t knn_reconstruct_workspace(const KnnReconstructParams& p, const Parallel& parallel) {
  const Plan plan(p);
  return p.batch * plan.item_bytes() + parallel.threads * plan.worker_bytes();
}

void knn_reconstruct(const KnnReconstructParams& p, const Parallel& parallel) {
  const Plan plan(p);
  parallel_tasks(parallel, p.batch * plan.panels, [&](int64_t task, int64_t worker) {
    pack_panel(plan, task / plan.panels, task % plan.panels, plan.worker(worker));
  });
  parallel_tasks(parallel, p.batch * plan.blocks, [&](int64_t task, int64_t worker) {
    visit_f32(p.dtype, [&]<class T>() {
      reconstruct_block<T>(plan, task / plan.blocks, task % plan.blocks, plan.worker(worker));
    });
  });
}

}  // namespace tokred::TOKRED_ISA
