// unmerged_attention on the CPU: every pair of positions has its weight, but the weights of keys
// that share a token are added before they are multiplied with its value, and so are those of
// queries that share a token. N positions of M tokens take N^2 D multiplications for the logits
// (half of it if causal) and M^2 Dv for the values, or N M Dv where the M x M table of weights
// would be large.
#include "attention/cpu/tile.h"
#include "common/cpu/parallel.h"
#include "common/cpu/workspace.h"
#include "sparse_attn/params.h"

namespace tokred::TOKRED_ISA {
namespace {

inline constexpr int64_t kPanels = 4;                 // of sixteen queries, of a block
inline constexpr float kRise = 8.0f;  // how far logits may lie above the base of their exponentials

// Whether weights are added up for pairs of tokens, rather than values for tokens of queries: where
// their table is smaller than the keys and values of the positions would be.
bool adds_weights(const UnmergedParams& p) {
  return p.query_tokens * p.tokens <= p.positions * (p.head_dim + p.value_dim);
}
int64_t result_width(const UnmergedParams& p) { return adds_weights(p) ? p.tokens : p.value_dim; }

struct Buffers {
  int32_t* key_position;  // [N], of the positions that have a token, ascending
  int32_t* key_token;  // [N]
  int32_t* query_position;  // [L]
  int32_t* query_token;  // [L]
  int32_t* members;  // [Mq], queries of a token
  float* query;  // [kPanels][D][16], rotated and scaled
  float* keys;  // [kBlock][D], rotated
  float* logits;  // [kTilePanels][kBlock][16]
  float* weights;  // [kPanels][M][16], of the block's queries for every token
  float* values;  // [M][Dv], or [ceil(Dv / 16)][M][16] where weights are added up
  float* attended;  // [kPanels][Dv][16]
  float* rows;  // [16][max(M, Dv, D)]
  float* sums;  // [Mq][M or Dv]

  void carve(Workspace& w, const UnmergedParams& p) {
    key_position = w.allocate<int32_t>(p.positions);
    key_token = w.allocate<int32_t>(p.positions);
    query_position = w.allocate<int32_t>(p.queries);
    query_token = w.allocate<int32_t>(p.queries);
    members = w.allocate<int32_t>(p.query_tokens);
    query = w.allocate<float>(kPanels * p.head_dim * kLanes);
    keys = w.allocate<float>(kBlock * p.head_dim);
    logits = w.allocate<float>(kTilePanels<float> * kBlock * kLanes);
    weights = w.allocate<float>(kPanels * p.tokens * kLanes);
    values = w.allocate<float>(p.tokens * round_up(p.value_dim, kLanes));
    attended = w.allocate<float>(kPanels * p.value_dim * kLanes);
    rows = w.allocate<float>(kLanes * max(p.tokens, max(p.value_dim, p.head_dim)));
    sums = w.allocate<float>(p.query_tokens * result_width(p));
  }
};

// One query head of an item.
template <class T>
struct Head {
  const UnmergedParams& p;
  const int64_t batch, head, kv_head;
  const bool by_weights;
  int64_t keys = 0, queries = 0;  // that have a token
  bool finite = true;  // all values
  Buffers b;
  alignas(64) float base[kPanels * kLanes];  // of the exponentials of each query

  Head(const UnmergedParams& params, int64_t batch_index, int64_t head_index, void* memory)
      : p(params), batch(batch_index), head(head_index),
        kv_head(head_index / (p.heads_q / p.heads_kv)), by_weights(adds_weights(p)) {
    Workspace workspace(memory);
    b.carve(workspace, p);
  }

  void run() {
    list_positions();
    load_values();
    std::memset(b.sums, 0, static_cast<size_t>(p.query_tokens * result_width(p)) * sizeof(float));
    for (int64_t first = 0; first < queries; first += kPanels * kLanes) {
      attend(first, min(queries - first, kPanels * kLanes));
    }
    write();
  }

  void list_positions() {
    const int32_t* key = p.token_map + batch * p.token_map_stride_batch;
    for (int64_t i = 0; i < p.positions; ++i) {
      const int32_t token = key[i * p.token_map_stride_token];
      if (token < 0 || token >= p.tokens) continue;
      b.key_position[keys] = static_cast<int32_t>(i);
      b.key_token[keys++] = token;
    }
    for (int64_t u = 0; u < p.query_tokens; ++u) b.members[u] = 0;
    const int32_t* query = p.query_map + batch * p.query_map_stride_batch;
    for (int64_t l = 0; l < p.queries; ++l) {
      const int32_t token = query[l * p.query_map_stride_token];
      if (token < 0 || token >= p.query_tokens) continue;
      b.query_position[queries] = static_cast<int32_t>(p.positions - p.queries + l);
      b.query_token[queries++] = token;
      ++b.members[token];
    }
  }

  void load_values() {
    f32x16 wrong = splat(0.0f);
    for (int64_t u = 0; u < p.tokens; ++u) {
      const T* from = key_row<T>(p.v, batch, kv_head, u);
      for (int64_t d = 0; d < p.value_dim; d += kLanes) {
        const f32x16 x = load_row(from + d, p.value_dim - d);
        wrong = wrong + (x - x);
        if (by_weights) {
          store(b.values + (d / kLanes * p.tokens + u) * kLanes, x);
        } else {
          store_row(b.values + u * p.value_dim + d, x, p.value_dim - d);
        }
      }
    }
    finite = sum(wrong) == 0;
  }

  // A row in f32, rotated to a position, times `scale`.
  void load_rotated(const T* from, int64_t position, float scale, float* to) const {
    pack_row(from, p.head_dim, to);
    const float* cos = p.cos + batch * p.cos_stride_batch + position * p.cos_stride_token;
    const float* sin = p.sin + batch * p.sin_stride_batch + position * p.sin_stride_token;
    for (int64_t d = 0; d < p.rotated; ++d) {
      const float left = to[d], right = to[d + p.rotated];
      to[d] = left * cos[d] - right * sin[d];
      to[d + p.rotated] = right * cos[d] + left * sin[d];
    }
    for (int64_t d = 0; d < p.head_dim; ++d) to[d] *= scale;
  }

  // Up to kPanels panels of queries, by blocks of keys.
  void attend(int64_t first, int64_t count) {
    const int64_t panels = divide_up(count, kLanes);
    for (int64_t panel = 0; panel < panels; ++panel) {
      load_queries(first + panel * kLanes, min(count - panel * kLanes, int64_t{kLanes}), panel);
    }
    std::memset(b.weights, 0, static_cast<size_t>(panels * p.tokens * kLanes) * sizeof(float));
    for (int64_t i = 0; i < panels * kLanes; ++i) base[i] = -kInfinity<float>;
    const int64_t last = b.query_position[first + count - 1];
    for (int64_t key = 0; key < keys; key += kBlock) {
      if (p.causal && b.key_position[key] > last) break;
      attend_block(first, panels, key, min(keys - key, int64_t{kBlock}));
    }
    for (int64_t panel = 0; panel < panels; ++panel) normalise(panel);
    add_to_tokens(first, count, panels);
  }

  int64_t last_position(int64_t first, int64_t panel) const {
    return b.query_position[min(first + (panel + 1) * kLanes, queries) - 1];
  }

  void load_queries(int64_t first, int64_t count, int64_t panel) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      float* to = b.rows + lane * p.head_dim;
      if (lane < count) {
        load_rotated(key_row<T>(p.q, batch, head, b.query_token[first + lane]),
                     b.query_position[first + lane], static_cast<float>(p.scale), to);
      } else {
        for (int64_t d = 0; d < p.head_dim; ++d) to[d] = 0;
      }
    }
    transpose(b.rows, kLanes, p.head_dim, b.query + panel * p.head_dim * kLanes);
  }

  void attend_block(int64_t first, int64_t panels, int64_t key, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      load_rotated(key_row<T>(p.k, batch, kv_head, b.key_token[key + i]), b.key_position[key + i],
                   1.0f, b.keys + i * p.head_dim);
    }
    int64_t panel = 0;  // the first that sees a key of the block
    while (p.causal && last_position(first, panel) < b.key_position[key]) ++panel;
    for (; panel < panels; panel += kTilePanels<float>) {
      const int64_t together = min(int64_t{kTilePanels<float>}, panels - panel);
      multiply<Layout::row_step>(b.keys, p.head_dim, count, b.query + panel * p.head_dim * kLanes,
                                 p.head_dim * kLanes, together, p.head_dim,
                                 [&](int64_t i, int tile_panel, f32x16 dot) {
                                   store(b.logits + (tile_panel * kBlock + i) * kLanes, dot);
                                 });
      for (int64_t i = 0; i < together; ++i) {
        float* logits = b.logits + i * kBlock * kLanes;
        if (p.causal) hide_later(first + (panel + i) * kLanes, key, count, logits);
        add_weights(panel + i, key, count, logits);
      }
    }
  }

  // Logits of keys behind a query to -inf.
  void hide_later(int64_t query, int64_t key, int64_t count, float* logits) const {
    if (b.key_position[key + count - 1] <= b.query_position[query]) return;
    int32_t lane_position[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lane_position[lane] = query + lane < queries ? b.query_position[query + lane] : -1;
    }
    const i32x16 position = load(lane_position);
    for (int64_t i = 0; i < count; ++i) {
      float* at = logits + i * kLanes;
      store(at, select_greater(splat(b.key_position[key + i]), position, splat(-kInfinity<float>),
                               load(at)));
    }
  }

  // Logits of a panel to weights, added up by token.
  __attribute__((noinline)) void add_weights(int64_t panel, int64_t key, int64_t count,
                                             const float* logits) {
    f32x16 top = load(logits);
    for (int64_t i = 1; i < count; ++i) top = max(load(logits + i * kLanes), top);
    float* weights = b.weights + panel * p.tokens * kLanes;
    const f32x16 old = load(base + panel * kLanes);
    // A base far below the top is moved, query by query; one that lies a little below stays, so
    // that the sums are seldom rescaled.
    const f32x16 next = select_greater(top, old + splat(kRise), top, old);
    if (max_lane(next - old) != 0) {  // NaN where both are -inf
      const f32x16 nothing = splat(-kInfinity<float>);
      const f32x16 shrink = exp(old - select_greater(next, nothing, next, splat(0.0f)));
      for (int64_t u = 0; u < p.tokens; ++u) {
        float* at = weights + u * kLanes;
        store(at, load(at) * shrink);
      }
      store(base + panel * kLanes, next);
    }
    const f32x16 safe = select_greater(next, splat(-kInfinity<float>), next, splat(0.0f));
    for (int64_t i = 0; i < count; ++i) {
      float* at = weights + b.key_token[key + i] * kLanes;
      store(at, load(at) + exp(load(logits + i * kLanes) - safe));
    }
  }

  // Weights of a query that add up to 1, or are all 0 where it has seen nothing.
  void normalise(int64_t panel) {
    float* weights = b.weights + panel * p.tokens * kLanes;
    f32x16 total = splat(0.0f);
    for (int64_t u = 0; u < p.tokens; ++u) total = total + load(weights + u * kLanes);
    const f32x16 zero = splat(0.0f);
    const f32x16 inverse = select_equal(total, 0.0f, zero, splat(1.0f) / total);
    for (int64_t u = 0; u < p.tokens; ++u) {
      float* at = weights + u * kLanes;
      store(at, load(at) * inverse);
    }
  }

  void add_to_tokens(int64_t first, int64_t count, int64_t panels) {
    const float* results = b.weights;
    if (!by_weights) {
      for (int64_t panel = 0; panel < panels; panel += kTilePanels<float>) {
        const int64_t together = min(int64_t{kTilePanels<float>}, panels - panel);
        const float* weights = b.weights + panel * p.tokens * kLanes;
        const auto emit = [&](int64_t d, int64_t tile_panel, f32x16 sum) {
          store(b.attended + ((panel + tile_panel) * p.value_dim + d) * kLanes, sum);
        };
        if (finite) {
          multiply<Layout::step_row>(b.values, p.value_dim, p.value_dim, weights, p.tokens * kLanes,
                                     together, p.tokens, emit);
        } else {
          multiply_nonzero<Layout::step_row>(b.values, p.value_dim, p.value_dim, weights,
                                             p.tokens * kLanes, together, p.tokens, emit);
        }
      }
      results = b.attended;
    }
    const int64_t width = result_width(p);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t lane = i % kLanes;
      if (lane == 0) transpose(results + i * width, width, kLanes, b.rows);
      add_row(b.rows + lane * width, width, b.sums + b.query_token[first + i] * width);
    }
  }
  static void add_row(const float* from, int64_t width, float* to) {
    for (int64_t c = 0; c < width; ++c) to[c] += from[c];
  }

  void write() {
    T* out = static_cast<T*>(p.out) + (batch * p.heads_q + head) * p.query_tokens * p.value_dim;
    const auto store_mean = [&](int64_t u, int64_t d, f32x16 sum) {
      const f32x16 mean =
          b.members[u] ? sum / splat(static_cast<float>(b.members[u])) : splat(0.0f);
      store_row(out + u * p.value_dim + d, mean, p.value_dim - d);
    };
    for (int64_t d = 0; d < p.value_dim; d += kLanes) {
      const float* panel = b.values + d * p.tokens;
      if (!by_weights) {
        for (int64_t u = 0; u < p.query_tokens; ++u) {
          store_mean(u, d, load_row(b.sums + u * p.value_dim + d, p.value_dim - d));
        }
      } else if (finite) {
        multiply<Layout::row_step>(b.sums, p.tokens, p.query_tokens, panel, 0, 1, p.tokens,
                                   [&](int64_t u, int, f32x16 sum) { store_mean(u, d, sum); });
      } else {
        for (int64_t u = 0; u < p.query_tokens; ++u) store_mean(u, d, seen_values(u, panel));
      }
    }
  }
  // The weighted values without those of weight 0: 0 times an infinity or NaN would be NaN.
  f32x16 seen_values(int64_t u, const float* panel) const {
    f32x16 sum = splat(0.0f);
    for (int64_t token = 0; token < p.tokens; ++token) {
      const float weight = b.sums[u * p.tokens + token];
      if (weight != 0) sum = fma(splat(weight), load(panel + token * kLanes), sum);
    }
    return sum;
  }
};

int64_t bytes_of_worker(const UnmergedParams& p) {
  return workspace_bytes([&](Workspace& w) { Buffers().carve(w, p); });
}

}  // namespace

int64_t unmerged_attention_workspace(const UnmergedParams& p, const Parallel& parallel) {
  return min(p.batch * p.heads_q, parallel.threads) * bytes_of_worker(p);
}

void unmerged_attention(const UnmergedParams& p, const Parallel& parallel) {
  const int64_t bytes = bytes_of_worker(p);
  visit_f32(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, p.batch * p.heads_q, [&](int64_t task, int64_t worker) {
      void* memory = static_cast<char*>(p.workspace) + worker * bytes;
      Head<T>(p, task / p.heads_q, task % p.heads_q, memory).run();
    });
  });
}

}  // namespace tokred::TOKRED_ISA
