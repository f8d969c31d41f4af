// dpc_knn: register tiles of dot products between panels of sixteen tokens, each pair of panels
// once where a thread has an item; every token keeps its k nearest. For most tokens one of these is
// denser, and no other can be nearer; the rest are compared with all tokens again.
//
// [32, 729, 1152]: half of all pairs are 19.6 GFLOP, 0.4 s at 50 GFLOP/s; the matrices of
// distances, 68 MB in fp32, are never stored.
#include "cluster/cpu/panels.h"
#include "cluster/params.h"
#include "common/cpu/items.h"
#include "common/cpu/lanes.h"
#include "common/cpu/parallel.h"
#include "common/cpu/sort.h"
#include "common/cpu/workspace.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr float kFar = __builtin_inff();
constexpr int64_t kAtOnce = kTileRows<float>;  // tokens that are compared with all others at once
constexpr double kWideWork = 1 << 24;  // products of an item that threads share
constexpr int32_t kNoRank = 0x7fffffff;

// The working arrays of an item. Squared norms are infinite where tokens do not take part, so that
// these are infinitely far from all others.
struct Item {
  int64_t number, tiles;
  float *panels, *norm, *squared;  // f32 [tiles][16]; panels [tiles][C][16]
  float* near;  // f32 [tiles][k][16]: the squared distances to the nearest tokens, ascending
  int32_t* who;  // i32 [tiles][k][16]: these tokens
  float* mean;  // f32 [tiles][16]: m
  float* delta;  // f32 [tiles][16]: the squared distance to the nearest denser token
  int32_t* rank;  // i32 [tiles][16]: how many are denser
  int32_t* order;  // i32 [tiles][16]: tokens, sorted, or those whose delta is not found yet
  uint64_t *keys, *spare;  // u64 [tiles][16]: what is sorted, a key above a token
  float *rows, *row_norm;  // [max(M, kAtOnce * threads)][C] tokens as rows
};

Item carve(const DpcKnnParams& p, int64_t threads, Workspace& workspace) {
  Item s{};
  s.tiles = divide_up(p.a.tokens, kLanes);
  const int64_t lanes = s.tiles * kLanes;
  const int64_t rows = max(min(p.clusters, p.a.tokens), kAtOnce * threads);
  s.panels = workspace.allocate<float>(lanes * p.channels);
  s.near = workspace.allocate<float>(lanes * p.k);
  s.who = workspace.allocate<int32_t>(lanes * p.k);
  for (float** array : {&s.norm, &s.squared, &s.mean, &s.delta}) {
    *array = workspace.allocate<float>(lanes);
  }
  s.rank = workspace.allocate<int32_t>(lanes);
  s.order = workspace.allocate<int32_t>(lanes);
  s.keys = workspace.allocate<uint64_t>(lanes);
  s.spare = workspace.allocate<uint64_t>(lanes);
  s.rows = workspace.allocate<float>(rows * p.channels);
  s.row_norm = workspace.allocate<float>(rows);
  return s;
}

ItemThreads item_threads(const DpcKnnParams& p, const Parallel& parallel) {
  const auto tokens = static_cast<double>(p.a.tokens);
  const double work = tokens * tokens * static_cast<double>(p.channels);
  return ItemThreads(parallel, p.batch, work >= kWideWork);
}

const float* panel_of(const DpcKnnParams& p, const Item& s, int64_t tile) {
  return s.panels + tile * p.channels * kLanes;
}
bool takes_part(const Item& s, int64_t token) { return s.norm[token] < kFar; }

template <class T>
void prepare_tile(const DpcKnnParams& p, const Item& s, int64_t tile) {
  const int64_t token0 = tile * kLanes;
  pack_panel<T>(p.a, s.number, token0, p.channels, Metric::l2, s.panels + token0 * p.channels,
                s.norm + token0, s.squared + token0);
  for (int64_t token = token0; token < token0 + kLanes; ++token) {
    if (s.squared[token] != s.squared[token]) s.norm[token] = kFar;
  }
  for (int64_t i = token0 * p.k; i < (token0 + kLanes) * p.k; ++i) {
    s.near[i] = kFar;
    s.who[i] = -1;
  }
}

TOKRED_INLINE f32x16 squared_distance(f32x16 dot, f32x16 norms) {
  return max(fma(splat(-2.0f), dot, norms), splat(0.0f));
}

// distance[row][lane] of the tokens of tile `other` to those of `tile`.
void tile_distances(const DpcKnnParams& p, const Item& s, int64_t tile, int64_t other,
                    float* distance) {
  const f32x16 norm = load(s.norm + tile * kLanes);
  multiply<Layout::step_row>(
      panel_of(p, s, other), kLanes, kLanes, panel_of(p, s, tile), 0, 1, p.channels,
      [&](int64_t row, int, f32x16 dot) {
        store(distance + row * kLanes,
              squared_distance(dot, norm + splat(s.norm[other * kLanes + row])));
      });
}

// Inserts sixteen tokens from token0 on into the lists of nearest tokens of a tile.
void insert(const DpcKnnParams& p, const Item& s, int64_t tile, const float* distance,
            int64_t token0) {
  float* near = s.near + tile * p.k * kLanes;
  int32_t* who = s.who + tile * p.k * kLanes;
  const float* last = near + (p.k - 1) * kLanes;
  for (int64_t row = 0; row < kLanes; ++row) {
    f32x16 apart = load(distance + row * kLanes);
    if (!greater_lanes(load(last), apart)) continue;
    i32x16 token = splat(static_cast<int32_t>(token0 + row));
    for (int64_t i = 0; i < p.k; ++i) {
      const f32x16 held = load(near + i * kLanes);
      const i32x16 holder = load(who + i * kLanes);
      store(near + i * kLanes, select_greater(held, apart, apart, held));
      store(who + i * kLanes, select_greater(held, apart, token, holder));
      token = select_greater(held, apart, holder, token);
      apart = select_greater(held, apart, held, apart);
    }
  }
}

// The k nearest of every token: other tiles come in ascending order, so that the order of equals is
// the same with any number of threads.
void find_nearest(const DpcKnnParams& p, const Item& s, const Parallel& parallel) {
  if (parallel.threads > 1) {
    parallel_tasks(parallel, s.tiles, [&](int64_t tile, int64_t) {
      alignas(64) float distance[kLanes * kLanes];
      for (int64_t other = 0; other < s.tiles; ++other) {
        tile_distances(p, s, tile, other, distance);
        insert(p, s, tile, distance, other * kLanes);
      }
    });
    return;
  }
  alignas(64) float distance[kLanes * kLanes], transposed[kLanes * kLanes];
  for (int64_t tile = 0; tile < s.tiles; ++tile) {
    for (int64_t other = tile; other < s.tiles; ++other) {
      tile_distances(p, s, tile, other, distance);
      insert(p, s, tile, distance, other * kLanes);
      if (other == tile) continue;
      transpose(distance, kLanes, kLanes, transposed);
      insert(p, s, other, transposed, tile * kLanes);
    }
  }
}

// Writes the first of `count` tokens, which ascend in their keys, in the order of the keys.
void write_order(const Item& s, int64_t count, int64_t first, int32_t* order) {
  uint64_t *keys = s.keys, *spare = s.spare;
  if (count > 0) radix_sort(keys, spare, count, 32, 32);
  for (int64_t i = 0; i < first; ++i) order[i] = static_cast<int32_t>(keys[i] & 0xffffffffu);
}
uint64_t keyed(uint32_t key, int64_t token) {
  return uint64_t{key} << 32 | static_cast<uint64_t>(token);
}

// Means over the nearest, and ranks by them.
void rank_densities(const DpcKnnParams& p, const Item& s) {
  int64_t count = 0;
  for (int64_t token = 0; token < s.tiles * kLanes; ++token) {
    s.rank[token] = kNoRank;
    if (!takes_part(s, token)) continue;
    const float* near = s.near + token / kLanes * p.k * kLanes + token % kLanes;
    float sum = 0.0f;
    int64_t found = 0;
    for (; found < p.k && near[found * kLanes] < kFar; ++found) sum += near[found * kLanes];
    // Where none is found, all distances overflow.
    s.mean[token] = !found       ? kFar
                    : p.channels ? sum / static_cast<float>(found * p.channels)
                                 : 0.0f;
    s.keys[count++] = keyed(ascending_key(s.mean[token]), token);
  }
  write_order(s, count, count, s.order);
  for (int64_t i = 0; i < count; ++i) s.rank[s.order[i]] = static_cast<int32_t>(i);
}

// Tokens as rows, with their norms.
void gather_rows(const DpcKnnParams& p, const Item& s, const int32_t* tokens, int64_t count,
                 float* rows, float* norms) {
  for (int64_t i = 0; i < count; ++i) {
    unpack_token(s.panels, p.channels, tokens[i], rows + i * p.channels);
    norms[i] = s.norm[tokens[i]];
  }
}

// The nearest denser token of up to kAtOnce tokens, among all.
void search_denser(const DpcKnnParams& p, const Item& s, const int32_t* tokens, int64_t count,
                   int64_t worker) {
  float* rows = s.rows + worker * kAtOnce * p.channels;
  float norms[kAtOnce];
  gather_rows(p, s, tokens, count, rows, norms);
  f32x16 nearest[kAtOnce];
  for (f32x16& some : nearest) some = splat(kFar);
  for (int64_t tile = 0; tile < s.tiles; ++tile) {
    const f32x16 norm = load(s.norm + tile * kLanes);
    const i32x16 rank = load(s.rank + tile * kLanes);
    multiply<Layout::row_step>(rows, p.channels, count, panel_of(p, s, tile), 0, 1, p.channels,
                               [&](int64_t row, int, f32x16 dot) {
                                 const f32x16 apart =
                                     squared_distance(dot, norm + splat(norms[row]));
                                 const f32x16 denser = select_greater(splat(s.rank[tokens[row]]),
                                                                      rank, apart, splat(kFar));
                                 nearest[row] = min(denser, nearest[row]);
                               });
  }
  for (int64_t i = 0; i < count; ++i) s.delta[tokens[i]] = min_lane(nearest[i]);
}

// The distance to the nearest denser token: in a token's list, or else among all.
void find_deltas(const DpcKnnParams& p, const Item& s, const Parallel& parallel) {
  int64_t open = 0;
  for (int64_t token = 0; token < s.tiles * kLanes; ++token) {
    const int64_t at = token / kLanes * p.k * kLanes + token % kLanes;
    int64_t i = 0;
    for (; i < p.k && s.who[at + i * kLanes] >= 0; ++i) {
      if (s.rank[s.who[at + i * kLanes]] < s.rank[token]) break;
    }
    s.delta[token] = kFar;
    if (i < p.k && s.who[at + i * kLanes] >= 0) {
      s.delta[token] = s.near[at + i * kLanes];
    } else if (takes_part(s, token) && s.rank[token] > 0) {
      s.order[open++] = static_cast<int32_t>(token);
    }
  }
  parallel_tasks(parallel, divide_up(open, kAtOnce), [&](int64_t task, int64_t worker) {
    const int64_t first = task * kAtOnce;
    search_denser(p, s, s.order + first, min(kAtOnce, open - first), worker);
  });
}

// The centres, and how many there are: by the logarithm of density * delta, which cannot underflow.
int64_t choose_centers(const DpcKnnParams& p, const Item& s) {
  int64_t count = 0;
  for (int64_t token = 0; token < s.tiles * kLanes; ++token) {
    if (!takes_part(s, token)) continue;
    const double score = 0.5 * __builtin_log(static_cast<double>(s.delta[token])) -
                         static_cast<double>(s.mean[token]);
    const auto rounded = static_cast<float>(score == score ? score : -__builtin_inf());
    s.keys[count++] = keyed(descending_key(s.rank[token] == 0 ? kFar : rounded), token);
  }
  const int64_t chosen = min(p.clusters, count);
  write_order(s, count, chosen, s.order);
  int32_t* centers = p.centers + s.number * p.clusters;
  for (int64_t i = 0; i < p.clusters; ++i) centers[i] = i < chosen ? s.order[i] : -1;
  return chosen;
}

// The nearest centre of a tile's tokens; `rows` are the centres.
void assign_tile(const DpcKnnParams& p, const Item& s, int64_t tile, int64_t centers) {
  const f32x16 norm = load(s.norm + tile * kLanes);
  f32x16 nearest = splat(kFar);
  i32x16 best = splat(int32_t{0});
  multiply<Layout::row_step>(
      s.rows, p.channels, centers, panel_of(p, s, tile), 0, 1, p.channels,
      [&](int64_t row, int, f32x16 dot) {
        const f32x16 apart = squared_distance(dot, norm + splat(s.row_norm[row]));
        best = select_greater(nearest, apart, splat(static_cast<int32_t>(row)), best);
        nearest = min(apart, nearest);
      });
  int32_t lane[kLanes];
  store(lane, best);
  const int64_t last = min((tile + 1) * kLanes, p.a.tokens);
  for (int64_t token = tile * kLanes; token < last; ++token) {
    const bool here = takes_part(s, token) && centers > 0;
    p.assignment[s.number * p.a.tokens + token] = here ? lane[token % kLanes] : -1;
  }
}

template <class T>
void cluster_item(const DpcKnnParams& p, const Item& s, const Parallel& parallel) {
  parallel_tasks(parallel, s.tiles, [&](int64_t tile, int64_t) { prepare_tile<T>(p, s, tile); });
  find_nearest(p, s, parallel);
  rank_densities(p, s);
  find_deltas(p, s, parallel);
  const int64_t centers = choose_centers(p, s);
  gather_rows(p, s, s.order, centers, s.rows, s.row_norm);
  parallel_tasks(parallel, s.tiles,
                 [&](int64_t tile, int64_t) { assign_tile(p, s, tile, centers); });
  int32_t* assignment = p.assignment + s.number * p.a.tokens;
  for (int64_t i = 0; i < centers; ++i) assignment[s.order[i]] = static_cast<int32_t>(i);
}

}  // namespace

int64_t dpc_knn_workspace(const DpcKnnParams& p, const Parallel& parallel) {
  return item_threads(p, parallel).bytes([&](int64_t threads, Workspace& workspace) {
    return carve(p, threads, workspace);
  });
}

void dpc_knn(const DpcKnnParams& p, const Parallel& parallel) {
  const auto memory = [&](int64_t threads, Workspace& workspace) {
    return carve(p, threads, workspace);
  };
  visit_f32(p.dtype, [&]<class T>() {
    item_threads(p, parallel)
        .for_each(p.batch, p.workspace, memory,
                  [&](int64_t number, Item item, const Parallel& inside) {
                    item.number = number;
                    cluster_item<T>(p, item, inside);
                  });
  });
}

}  // namespace tokred::TOKRED_ISA
