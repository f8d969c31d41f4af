// Gradients of biased_attention on the CPU, without atomics: first every query owns its grad_q,
// then every key its grad_k, grad_v and grad_bias. Both passes recompute the weights from lse.
#include "../ops/sparse_attn_params.h"
#include "parallel.h"
#include "sparse_attn_tile.h"

namespace tokred::TOKRED_ISA {
namespace {

// The (query, head) rows of one kv head in everything that the gradients read.
template <class T>
struct QueryRows {
  using Acc = Accumulator<T>;
  Rows<const T> q, out, grad_out;
  Rows<const Acc> lse, grad_lse;
  Rows<Acc> delta;

  QueryRows(const AttentionBackwardParams& b, int64_t batch, int64_t kv_head) {
    const AttentionParams& p = b.forward;
    const int64_t group = p.heads_q / p.heads_kv;
    const HeadTensor o{p.out, p.out_stride_batch, p.out_stride_head, p.out_stride_token};
    const auto table = [&](const void* data) {
      return contiguous(data, p.heads_q, p.queries, 1);
    };
    q = query_rows<const T>(p.q, batch, kv_head, group);
    out = query_rows<const T>(o, batch, kv_head, group);
    grad_out = query_rows<const T>(b.grad_out, batch, kv_head, group);
    lse = query_rows<const Acc>(table(p.lse), batch, kv_head, group);
    grad_lse = query_rows<const Acc>(table(b.grad_lse), batch, kv_head, group);
    delta = query_rows<Acc>(table(b.delta), batch, kv_head, group);
  }

  // With lse +inf, the weights of a row that saw nothing are exp(logit - inf) = 0.
  bool saw_nothing(int64_t row) const { return *lse[row] == -kInfinity<Acc>; }
  Acc safe_lse(int64_t row) const { return saw_nothing(row) ? kInfinity<Acc> : *lse[row]; }

  Acc make_delta(int64_t row, int64_t dim) const {
    if (saw_nothing(row)) return 0;
    Acc total = 0;
    for (int64_t d = 0; d < dim; ++d) total += to_float(out[row][d]) * to_float(grad_out[row][d]);
    return total - *grad_lse[row];
  }
};

// Lanes are (query, head) rows; blocks of keys stream past.
template <class T>
struct QueryPass {
  using Acc = Accumulator<T>;
  static constexpr int64_t kWeights = kBlock * kLanes;

  const AttentionParams& p;
  const Visibility see;
  const QueryRows<T> rows;
  const Rows<T> grad_rows;
  const int64_t batch, kv_head, first_row, panels;
  alignas(64) Acc query[kPanelNumbers];     // [panel][head_dim][16], scaled
  alignas(64) Acc grad_out[kPanelNumbers];  // [panel][value_dim][16]
  alignas(64) Acc grad_query[kPanelNumbers];
  alignas(64) Acc lse[kMaxPanels * kLanes];
  alignas(64) Acc delta[kMaxPanels * kLanes];
  alignas(64) Acc weights[kTilePanels<Acc> * kWeights];
  KeyBlock<T> block;

  QueryPass(const AttentionBackwardParams& b, int64_t batch_index, int64_t head, int64_t row,
            int64_t max_panels)
      : p(b.forward), see(p, batch_index, head), rows(b, batch_index, head),
        grad_rows(query_rows<T>(contiguous(b.grad_q, p.heads_q, p.queries, p.head_dim),
                                batch_index, head, see.group)),
        batch(batch_index), kv_head(head), first_row(row),
        panels(smaller(max_panels, divide_up(see.rows - row, kLanes))) {
    for (int64_t panel = 0; panel < panels; ++panel) load_panel(panel);
    for (int64_t i = 0; i < panels * p.head_dim * kLanes; ++i) grad_query[i] = 0;
  }

  int64_t panel_row(int64_t panel) const { return first_row + panel * kLanes; }
  int64_t last_row(int64_t panel) const {
    return smaller(panel_row(panel) + kLanes, see.rows) - 1;
  }

  void load_panel(int64_t panel) {
    const int64_t first = panel_row(panel);
    const auto lanes_of = [&](const Rows<const T>& x) {
      return [=, this](int lane) { return first + lane < see.rows ? x[first + lane] : nullptr; };
    };
    pack_panel<T>(lanes_of(rows.q), p.head_dim, static_cast<Acc>(p.scale),
                  query + panel * p.head_dim * kLanes);
    pack_panel<T>(lanes_of(rows.grad_out), p.value_dim, Acc{1},
                  grad_out + panel * p.value_dim * kLanes);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t row = first + lane, at = panel * kLanes + lane;
      lse[at] = kInfinity<Acc>;
      delta[at] = 0;
      if (row >= see.rows) continue;
      lse[at] = rows.safe_lse(row);
      delta[at] = rows.make_delta(row, p.value_dim);
      *rows.delta[row] = delta[at];
    }
  }

  void run() {
    const int64_t end = smaller(see.limit(last_row(panels - 1)) + 1, p.keys);
    for (int64_t key = 0; key < end;) {
      key = block.fill(p, see, batch, kv_head, key, end);
      if (block.count == 0) continue;
      const auto show = [&](int64_t panel) {
        return see.shown(panel_row(panel), last_row(panel), block.first, block.last);
      };
      visit_panels<Acc>(panels, show, [&](int64_t panel, int64_t count, const Shown* shown) {
        weigh(panel, count, shown);
        add_gradient(panel, count);
      });
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t row = panel_row(panel);
      unpack_panel<T>(grad_query + panel * p.head_dim * kLanes, last_row(panel) - row + 1,
                      p.head_dim, static_cast<Acc>(p.scale),
                      [&](int64_t lane) { return grad_rows[row + lane]; });
    }
  }

  // weights = p
  void weigh(int64_t panel, int64_t count, const Shown* shown) {
    multiply<Layout::row_step>(
        block.k, p.head_dim, block.count, query + panel * p.head_dim * kLanes,
        p.head_dim * kLanes, count, p.head_dim, [&](int64_t key, int i, Vec<Acc> sum) {
          store(weights + i * kWeights + key * kLanes, sum + splat(block.bias[key]));
        });
    for (int64_t i = 0; i < count; ++i) {
      Acc* tile_weights = weights + i * kWeights;
      if (shown[i] == Shown::some) hide_keys<T>(see, block, panel_row(panel + i), tile_weights);
      const Vec<Acc> base = load(lse + (panel + i) * kLanes);
      for (int64_t key = 0; key < block.count; ++key) {
        store(tile_weights + key * kLanes, exp(load(tile_weights + key * kLanes) - base));
      }
    }
  }

  // weights = ds, grad_query += ds k
  void add_gradient(int64_t panel, int64_t count) {
    multiply<Layout::row_step>(
        block.v, p.value_dim, block.count, grad_out + panel * p.value_dim * kLanes,
        p.value_dim * kLanes, count, p.value_dim, [&](int64_t key, int i, Vec<Acc> sum) {
          Acc* at = weights + i * kWeights + key * kLanes;
          store(at, load(at) * (sum - load(delta + (panel + i) * kLanes)));
        });
    multiply<Layout::step_row>(block.k, p.head_dim, p.head_dim, weights, kWeights, count,
                               block.count, [&](int64_t d, int i, Vec<Acc> sum) {
                                 Acc* at = grad_query + ((panel + i) * p.head_dim + d) * kLanes;
                                 store(at, load(at) + sum);
                               });
  }
};

// Lanes are keys; blocks of (query, head) rows stream past.
template <class T>
struct KeyPass {
  using Acc = Accumulator<T>;
  static constexpr int64_t kWeights = kBlock * kLanes;

  const AttentionBackwardParams& backward;
  const AttentionParams& p;
  const Visibility see;
  const QueryRows<T> rows;
  const int64_t batch, kv_head, first_key, panels;
  bool dead[kMaxPanels];                // no row sees any of the panel's keys
  alignas(64) Acc key[kPanelNumbers];   // [panel][head_dim][16], scaled
  alignas(64) Acc value[kPanelNumbers];  // [panel][value_dim][16]
  alignas(64) Acc grad_key[kPanelNumbers];
  alignas(64) Acc grad_value[kPanelNumbers];
  alignas(64) Acc bias[kMaxPanels * kLanes];
  alignas(64) Acc grad_bias[kMaxPanels * kLanes];
  alignas(64) Acc weights[kTilePanels<Acc> * kWeights];
  int64_t block_first, block_count;
  alignas(64) Acc lse[kBlock];
  alignas(64) Acc delta[kBlock];
  alignas(64) Acc q[kBlock * kMaxHeadDim];
  alignas(64) Acc grad_out[kBlock * kMaxHeadDim];

  KeyPass(const AttentionBackwardParams& b, int64_t batch_index, int64_t head, int64_t first,
          int64_t max_panels)
      : backward(b), p(b.forward), see(p, batch_index, head), rows(b, batch_index, head),
        batch(batch_index), kv_head(head), first_key(first),
        panels(smaller(max_panels, divide_up(p.keys - first, kLanes))) {
    for (int64_t panel = 0; panel < panels; ++panel) load_panel(panel);
    for (int64_t i = 0; i < panels * p.head_dim * kLanes; ++i) grad_key[i] = 0;
    for (int64_t i = 0; i < panels * p.value_dim * kLanes; ++i) grad_value[i] = 0;
    for (int64_t i = 0; i < panels * kLanes; ++i) grad_bias[i] = 0;
  }

  int64_t panel_key(int64_t panel) const { return first_key + panel * kLanes; }
  int64_t last_key(int64_t panel) const { return smaller(panel_key(panel) + kLanes, p.keys) - 1; }

  void load_panel(int64_t panel) {
    const int64_t first = panel_key(panel);
    const auto visible = [&](int lane) {
      return first + lane < p.keys && !see.hides_key(first + lane);
    };
    const auto lanes_of = [&](const HeadTensor& x) {
      return [&, this](int lane) {
        return visible(lane) ? key_row<T>(x, batch, kv_head, first + lane) : nullptr;
      };
    };
    pack_panel<T>(lanes_of(p.k), p.head_dim, static_cast<Acc>(p.scale),
                  key + panel * p.head_dim * kLanes);
    pack_panel<T>(lanes_of(p.v), p.value_dim, Acc{1}, value + panel * p.value_dim * kLanes);
    dead[panel] = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      bias[panel * kLanes + lane] =
          visible(lane) ? key_bias<Acc>(p, batch, kv_head, first + lane) : -kInfinity<Acc>;
      dead[panel] = dead[panel] && !visible(lane);
    }
  }

  void run() {
    for (block_first = 0; block_first < see.rows; block_first += kBlock) {
      block_count = smaller(kBlock, see.rows - block_first);
      const int64_t last = block_first + block_count - 1;
      if (first_key > see.limit(last)) continue;
      load_block();
      const auto show = [&](int64_t panel) {
        return dead[panel] ? Shown::none
                           : see.shown(block_first, last, panel_key(panel), last_key(panel));
      };
      visit_panels<Acc>(panels, show, [&](int64_t panel, int64_t count, const Shown* shown) {
        weigh(panel, count, shown);
        add_gradients(panel, count);
      });
    }
    for (int64_t panel = 0; panel < panels; ++panel) finish(panel);
  }

  void load_block() {
    for (int64_t i = 0; i < block_count; ++i) {
      const int64_t row = block_first + i;
      lse[i] = rows.safe_lse(row);
      delta[i] = *rows.delta[row];
      pack_row(rows.q[row], p.head_dim, q + i * p.head_dim);
      pack_row(rows.grad_out[row], p.value_dim, grad_out + i * p.value_dim);
    }
  }

  // weights = p
  void weigh(int64_t panel, int64_t count, const Shown* shown) {
    multiply<Layout::row_step>(
        q, p.head_dim, block_count, key + panel * p.head_dim * kLanes, p.head_dim * kLanes, count,
        p.head_dim, [&](int64_t row, int i, Vec<Acc> sum) {
          store(weights + i * kWeights + row * kLanes, sum + load(bias + (panel + i) * kLanes));
        });
    for (int64_t i = 0; i < count; ++i) {
      Acc* tile_weights = weights + i * kWeights;
      if (shown[i] == Shown::some) {
        hide_rows<T>(see, block_first, block_count, panel_key(panel + i), tile_weights);
      }
      for (int64_t row = 0; row < block_count; ++row) {
        Acc* at = tile_weights + row * kLanes;
        store(at, exp(load(at) - splat(lse[row])));
      }
    }
  }

  // grad_value += p^T grad_out, weights = ds, grad_key += ds^T q, grad_bias += the sums of ds
  void add_gradients(int64_t panel, int64_t count) {
    multiply<Layout::step_row>(grad_out, p.value_dim, p.value_dim, weights, kWeights, count,
                               block_count, [&](int64_t d, int i, Vec<Acc> sum) {
                                 Acc* at = grad_value + ((panel + i) * p.value_dim + d) * kLanes;
                                 store(at, load(at) + sum);
                               });
    multiply<Layout::row_step>(
        grad_out, p.value_dim, block_count, value + panel * p.value_dim * kLanes,
        p.value_dim * kLanes, count, p.value_dim, [&](int64_t row, int i, Vec<Acc> sum) {
          Acc* at = weights + i * kWeights + row * kLanes;
          store(at, load(at) * (sum - splat(delta[row])));
        });
    multiply<Layout::step_row>(q, p.head_dim, p.head_dim, weights, kWeights, count, block_count,
                               [&](int64_t d, int i, Vec<Acc> sum) {
                                 Acc* at = grad_key + ((panel + i) * p.head_dim + d) * kLanes;
                                 store(at, load(at) + sum);
                               });
    for (int64_t i = 0; i < count; ++i) {
      Vec<Acc> sum = splat(Acc{0});
      for (int64_t row = 0; row < block_count; ++row) {
        sum = sum + load(weights + i * kWeights + row * kLanes);
      }
      Acc* at = grad_bias + (panel + i) * kLanes;
      store(at, load(at) + sum);
    }
  }

  void finish(int64_t panel) {
    const int64_t count = last_key(panel) - panel_key(panel) + 1;
    const int64_t first = (batch * p.heads_kv + kv_head) * p.keys + panel_key(panel);
    unpack_panel<T>(grad_key + panel * p.head_dim * kLanes, count, p.head_dim,
                    static_cast<Acc>(p.scale), [&](int64_t lane) {
                      return static_cast<T*>(backward.grad_k) + (first + lane) * p.head_dim;
                    });
    unpack_panel<T>(grad_value + panel * p.value_dim * kLanes, count, p.value_dim, Acc{1},
                    [&](int64_t lane) {
                      return static_cast<T*>(backward.grad_v) + (first + lane) * p.value_dim;
                    });
    if (!backward.grad_bias) return;
    for (int64_t lane = 0; lane < count; ++lane) {
      static_cast<Acc*>(backward.grad_bias)[first + lane] = grad_bias[panel * kLanes + lane];
    }
  }
};

// Runs Pass over blocks of panels of `count` rows or keys a kv head.
template <class Pass>
void run_pass(const AttentionBackwardParams& b, int64_t count, const Parallel& parallel) {
  const AttentionParams& p = b.forward;
  const int64_t panels = panels_per_task(p, count, parallel.threads);
  const int64_t blocks = divide_up(count, panels * kLanes);
  parallel_tasks(parallel, p.batch * p.heads_kv * blocks, [&](int64_t task, int64_t) {
    const int64_t head = task / blocks, first = task % blocks * panels * kLanes;
    Pass(b, head / p.heads_kv, head % p.heads_kv, first, panels).run();
  });
}

}  // namespace

void biased_attention_backward(const AttentionBackwardParams& b, const Parallel& parallel) {
  const AttentionParams& p = b.forward;
  visit_dtype(p.dtype, [&]<class T>() {
    run_pass<QueryPass<T>>(b, p.queries * (p.heads_q / p.heads_kv), parallel);
    run_pass<KeyPass<T>>(b, p.keys, parallel);
  });
}

}  // namespace tokred::TOKRED_ISA
