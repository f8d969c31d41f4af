// Gradients of biased_attention on the CPU, without atomics: first every query owns its grad_q,
// then every key its grad_k, grad_v and grad_bias. Both passes recompute the weights from lse.
#include "attention/cpu/tile.h"
#include "common/cpu/parallel.h"
#include "sparse_attn/params.h"

namespace tokred::TOKRED_ISA {
namespace {

// The rows of `group` heads, see Visibility, in everything that the gradients read.
template <class T>
struct QueryRows {
  using Acc = Accumulator<T>;
  Rows<const T> q, out, grad_out;
  Rows<const Acc> lse, grad_lse;
  Rows<Acc> delta;

  QueryRows(const AttentionBackwardParams& b, int64_t batch, int64_t head, int64_t group) {
    const AttentionParams& p = b.forward;
    const auto table = [&](const void* data) { return contiguous(data, p.heads_q, p.queries, 1); };
    q = query_rows<const T>(p.q, batch, head, group);
    out = query_rows<const T>(p.out_view(), batch, head, group);
    grad_out = query_rows<const T>(b.grad_out, batch, head, group);
    lse = query_rows<const Acc>(table(p.lse), batch, head, group);
    grad_lse = query_rows<const Acc>(table(b.grad_lse), batch, head, group);
    delta = query_rows<Acc>(table(b.delta), batch, head, group);
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

// sums [panel][dim][16] += block [step][dim] . weights [panel][step][16]. A pass whose sums have
// NaN is computed again without the products of weights of 0: 0 times infinity would be NaN.
template <bool kSkipZeros, class Acc>
void add_products(const Acc* block, int64_t dim, const Acc* weights, int64_t weights_stride,
                  int64_t panels, int64_t steps, Acc* sums) {
  const auto add = [&](int64_t d, int64_t panel, Vec<Acc> sum) {
    Acc* at = sums + (panel * dim + d) * kLanes;
    store(at, load(at) + sum);
  };
  if constexpr (kSkipZeros) {
    multiply_nonzero<Layout::step_row>(block, dim, dim, weights, weights_stride, panels, steps,
                                       add);
  } else {
    multiply<Layout::step_row>(block, dim, dim, weights, weights_stride, panels, steps, add);
  }
}

// Lanes are (query, head) rows; blocks of keys stream past.
template <class T>
struct QueryPass {
  using Acc = Accumulator<T>;
  static constexpr int64_t kWeights = kBlock * kLanes;

  const AttentionParams& p;
  const Visibility see;
  const QueryRows<T> rows;
  const Rows<T> grad_rows;
  const int64_t batch, kv_head, first_row, end_row, panels;
  alignas(64) Acc query[kPanelNumbers];     // [panel][head_dim][16], scaled
  alignas(64) Acc grad_out[kPanelNumbers];  // [panel][value_dim][16]
  alignas(64) Acc grad_query[kPanelNumbers];
  alignas(64) Acc lse[kMaxPanels * kLanes];
  alignas(64) Acc delta[kMaxPanels * kLanes];
  alignas(64) Acc weights[kTilePanels<Acc> * kWeights];
  KeyBlock<T> block;

  QueryPass(const AttentionBackwardParams& b, int64_t batch_index, int64_t head, int64_t group,
            int64_t row, int64_t end)
      : p(b.forward), see(Visibility(p, batch_index, head, group).of_rows(row)),
        rows(b, batch_index, head, group),
        grad_rows(query_rows<T>(contiguous(b.grad_q, p.heads_q, p.queries, p.head_dim), batch_index,
                                head, group)),
        batch(batch_index), kv_head(head * group / (p.heads_q / p.heads_kv)), first_row(row),
        end_row(end), panels(divide_up(end - row, kLanes)) {
    for (int64_t panel = 0; panel < panels; ++panel) load_panel(panel);
  }

  int64_t panel_row(int64_t panel) const { return first_row + panel * kLanes; }
  int64_t last_row(int64_t panel) const { return min(panel_row(panel) + kLanes, end_row) - 1; }

  void load_panel(int64_t panel) {
    const int64_t first = panel_row(panel);
    const auto lanes_of = [&](const Rows<const T>& x) {
      return [=, this](int lane) { return first + lane < end_row ? x[first + lane] : nullptr; };
    };
    pack_panel<T>(lanes_of(rows.q), p.head_dim, static_cast<Acc>(p.scale),
                  query + panel * p.head_dim * kLanes);
    pack_panel<T>(lanes_of(rows.grad_out), p.value_dim, Acc{1},
                  grad_out + panel * p.value_dim * kLanes);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t row = first + lane, at = panel * kLanes + lane;
      lse[at] = kInfinity<Acc>;
      delta[at] = 0;
      if (row >= end_row) continue;
      lse[at] = rows.safe_lse(row);
      delta[at] = rows.make_delta(row, p.value_dim);
      *rows.delta[row] = delta[at];
    }
  }

  void run() {
    add_keys<false>();
    if (any_nan(grad_query, panels * p.head_dim * kLanes)) add_keys<true>();
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t row = panel_row(panel);
      unpack_panel<T>(grad_query + panel * p.head_dim * kLanes, last_row(panel) - row + 1,
                      p.head_dim, static_cast<Acc>(p.scale),
                      [&](int64_t lane) { return grad_rows[row + lane]; });
    }
  }

  template <bool kSkipZeros>
  void add_keys() {
    for (int64_t i = 0; i < panels * p.head_dim * kLanes; ++i) grad_query[i] = 0;
    const int64_t end = min(see.limit(end_row - 1) + 1, p.keys);
    for (int64_t key = 0; key < end;) {
      key = block.choose(p, see, batch, kv_head, key, end);
      if (block.count > 0) add_block<kSkipZeros>();
    }
  }

  template <bool kSkipZeros>
  void add_block() {
    Coverage coverage[kMaxPanels];
    const bool any = cover_panels(panels, coverage, [&](int64_t panel) {
      return see.coverage(panel_row(panel), last_row(panel), block.first, block.last);
    });
    if (!any) return;
    block.pack(p, batch, kv_head);
    visit_panels<Acc>(panels, coverage, [&](int64_t panel, int64_t count) {
      weigh(panel, count, coverage + panel);
      add_gradient<kSkipZeros>(panel, count);
    });
  }

  // weights = p
  void weigh(int64_t panel, int64_t count, const Coverage* coverage) {
    multiply<Layout::row_step>(
        block.k, p.head_dim, block.count, query + panel * p.head_dim * kLanes, p.head_dim * kLanes,
        count, p.head_dim, [&](int64_t key, int i, Vec<Acc> sum) {
          store(weights + i * kWeights + key * kLanes, sum + splat(block.bias[key]));
        });
    for (int64_t i = 0; i < count; ++i) {
      Acc* tile_weights = weights + i * kWeights;
      if (coverage[i] == Coverage::some)
        hide_keys<T>(see, block, panel_row(panel + i), tile_weights);
      const Vec<Acc> base = load(lse + (panel + i) * kLanes);
      for (int64_t key = 0; key < block.count; ++key) {
        store(tile_weights + key * kLanes, weight_of(load(tile_weights + key * kLanes), base));
      }
    }
  }

  // weights = ds, grad_query += ds k
  template <bool kSkipZeros>
  void add_gradient(int64_t panel, int64_t count) {
    multiply<Layout::row_step>(
        block.v, p.value_dim, block.count, grad_out + panel * p.value_dim * kLanes,
        p.value_dim * kLanes, count, p.value_dim, [&](int64_t key, int i, Vec<Acc> sum) {
          Acc* at = weights + i * kWeights + key * kLanes;
          store(at, grad_of_logit(load(at), sum, load(delta + (panel + i) * kLanes)));
        });
    add_products<kSkipZeros>(block.k, p.head_dim, weights, kWeights, count, block.count,
                             grad_query + panel * p.head_dim * kLanes);
  }
};

// Lanes are keys; blocks of (query, head) rows stream past.
template <class T>
struct KeyPass {
  using Acc = Accumulator<T>;
  static constexpr int64_t kWeights = kBlock * kLanes;

  const AttentionBackwardParams& backward;
  const AttentionParams& p;
  const int64_t batch, kv_head, group, first_key, end_key, panels;
  Visibility see;     // of the heads whose rows stream past at the moment
  QueryRows<T> rows;
  bool dead[kMaxPanels];                // no row sees any of the panel's keys
  alignas(64) Acc key[kPanelNumbers];   // [panel][head_dim][16], scaled
  alignas(64) Acc value[kPanelNumbers];  // [panel][value_dim][16]
  alignas(64) Acc grad_key[kPanelNumbers];
  alignas(64) Acc grad_value[kPanelNumbers];
  alignas(64) Acc bias[kMaxPanels * kLanes];
  alignas(64) Acc grad_bias[kMaxPanels * kLanes];
  alignas(64) Acc weights[kTilePanels<Acc> * kWeights];
  int64_t block_count, block_row[kBlock];
  alignas(64) Acc lse[kBlock];
  alignas(64) Acc delta[kBlock];
  alignas(64) Acc q[kBlock * kMaxHeadDim];
  alignas(64) Acc grad_out[kBlock * kMaxHeadDim];

  // Keys [first, end) of a kv head.
  KeyPass(const AttentionBackwardParams& b, int64_t batch_index, int64_t head, int64_t rows_group,
          int64_t first, int64_t end)
      : backward(b), p(b.forward), batch(batch_index), kv_head(head), group(rows_group),
        first_key(first), end_key(end), panels(divide_up(end - first, kLanes)),
        see(p, batch, 0, group), rows(b, batch, 0, group) {}

  int64_t panel_key(int64_t panel) const { return first_key + panel * kLanes; }
  int64_t last_key(int64_t panel) const { return min(panel_key(panel) + kLanes, end_key) - 1; }

  void load_panel(int64_t panel) {
    const int64_t first = panel_key(panel);
    const auto visible = [&](int lane) {
      return first + lane < end_key && !see.hides_key(first + lane) &&
             key_bias<Acc>(p, batch, kv_head, first + lane) > -kInfinity<Acc>;
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
    add_rows<false>();
    if (any_nan(grad_key, panels * p.head_dim * kLanes) ||
        any_nan(grad_value, panels * p.value_dim * kLanes)) {
      add_rows<true>();
    }
    for (int64_t panel = 0; panel < panels; ++panel) finish(panel);
  }

  template <bool kSkipZeros>
  void add_rows() {
    for (int64_t i = 0; i < panels * p.head_dim * kLanes; ++i) grad_key[i] = 0;
    for (int64_t i = 0; i < panels * p.value_dim * kLanes; ++i) grad_value[i] = 0;
    for (int64_t i = 0; i < panels * kLanes; ++i) grad_bias[i] = 0;
    const int64_t shares = p.heads_q / p.heads_kv / group;
    for (int64_t head = kv_head * shares; head < (kv_head + 1) * shares; ++head) {
      see = Visibility(p, batch, head, group).of_keys(first_key);
      rows = QueryRows<T>(backward, batch, head, group);
      for (int64_t panel = 0; panel < panels; ++panel) load_panel(panel);
      for (int64_t row = 0; row < see.rows;) {
        row = choose_visible(
            see.row_blocks, row, see.rows, [](int64_t) { return false; }, block_row, block_count);
        if (block_count > 0) add_block<kSkipZeros>();
      }
    }
  }

  template <bool kSkipZeros>
  void add_block() {
    Coverage coverage[kMaxPanels];
    const bool any = cover_panels(panels, coverage, [&](int64_t panel) {
      if (dead[panel]) return Coverage::none;
      return see.coverage(block_row[0], block_row[block_count - 1], panel_key(panel),
                          last_key(panel));
    });
    if (!any) return;
    load_block();
    visit_panels<Acc>(panels, coverage, [&](int64_t panel, int64_t count) {
      weigh(panel, count, coverage + panel);
      add_gradients<kSkipZeros>(panel, count);
    });
  }

  void load_block() {
    for (int64_t i = 0; i < block_count; ++i) {
      const int64_t row = block_row[i];
      lse[i] = rows.safe_lse(row);
      delta[i] = *rows.delta[row];
      pack_row(rows.q[row], p.head_dim, q + i * p.head_dim);
      pack_row(rows.grad_out[row], p.value_dim, grad_out + i * p.value_dim);
    }
  }

  // weights = p
  void weigh(int64_t panel, int64_t count, const Coverage* coverage) {
    multiply<Layout::row_step>(
        q, p.head_dim, block_count, key + panel * p.head_dim * kLanes, p.head_dim * kLanes, count,
        p.head_dim, [&](int64_t row, int i, Vec<Acc> sum) {
          store(weights + i * kWeights + row * kLanes, sum + load(bias + (panel + i) * kLanes));
        });
    for (int64_t i = 0; i < count; ++i) {
      Acc* tile_weights = weights + i * kWeights;
      if (coverage[i] == Coverage::some) {
        hide_listed_rows(see, block_row, block_count, panel_key(panel + i), tile_weights);
      }
      for (int64_t row = 0; row < block_count; ++row) {
        Acc* at = tile_weights + row * kLanes;
        store(at, weight_of(load(at), splat(lse[row])));
      }
    }
  }

  // grad_value += p^T grad_out, weights = ds, grad_key += ds^T q, grad_bias += the sums of ds
  template <bool kSkipZeros>
  void add_gradients(int64_t panel, int64_t count) {
    add_products<kSkipZeros>(grad_out, p.value_dim, weights, kWeights, count, block_count,
                             grad_value + panel * p.value_dim * kLanes);
    multiply<Layout::row_step>(grad_out, p.value_dim, block_count,
                               value + panel * p.value_dim * kLanes, p.value_dim * kLanes, count,
                               p.value_dim, [&](int64_t row, int i, Vec<Acc> sum) {
                                 Acc* at = weights + i * kWeights + row * kLanes;
                                 store(at, grad_of_logit(load(at), sum, splat(delta[row])));
                               });
    add_products<kSkipZeros>(q, p.head_dim, weights, kWeights, count, block_count,
                             grad_key + panel * p.head_dim * kLanes);
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

// Runs Pass over every task of `heads` heads.
template <class Pass>
void run_pass(const AttentionBackwardParams& b, int64_t heads, int64_t group, const Tasks& tasks,
              const Parallel& parallel) {
  parallel_tasks(parallel, b.forward.batch * heads * tasks.in_head, [&](int64_t task, int64_t) {
    const int64_t head = task / tasks.in_head, part = task % tasks.in_head;
    const int64_t first = tasks.first(part), end = tasks.end(part);
    if (first < end) Pass(b, head / heads, head % heads, group, first, end).run();
  });
}

}  // namespace

void biased_attention_backward(const AttentionBackwardParams& b, const Parallel& parallel) {
  const AttentionParams& p = b.forward;
  const int64_t group = row_group(p), rows = p.queries * group;
  if (p.batch == 0 || p.heads_q == 0) return;
  const Visibility see(p, 0, 0, group);
  const Tasks row_tasks(p, rows, see.rows_in_strip(), parallel.threads);
  const Tasks key_tasks(p, p.keys, see.keys_in_strip(), parallel.threads);
  visit_dtype(p.dtype, [&]<class T>() {
    run_pass<QueryPass<T>>(b, p.heads_q / group, group, row_tasks, parallel);
    run_pass<KeyPass<T>>(b, p.heads_kv, group, key_tasks, parallel);
  });
}

}  // namespace tokred::TOKRED_ISA
