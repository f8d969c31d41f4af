// The gradients of logits by rows of queries, and of the queries: every row owns its grad_q.
#pragma once

#include "sparse_attn/cpu/gradient_rows.h"

namespace tokred::TOKRED_ISA {

// Lanes are (query, head) rows; blocks of keys stream past.
template <class T>
struct QueryPass {
  using Acc = Accumulator<T>;
  static constexpr int64_t kWeights = kBlock * kLanes;

  const AttentionParams& p;
  const Visibility see;
  const GradientRows<T> rows;
  const Rows<T> grad_rows;
  const int64_t batch, kv_head, first_row, end_row, panels;
  const bool stores_delta;
  alignas(64) Acc query[kPanelNumbers];  // [panel][head_dim][16], scaled
  alignas(64) Acc grad_out[kPanelNumbers];  // [panel][value_dim][16]
  alignas(64) Acc grad_query[kPanelNumbers];
  alignas(64) Acc lse[kMaxPanels * kLanes];
  alignas(64) Acc delta[kMaxPanels * kLanes];
  alignas(64) Acc weights[kTilePanels<Acc> * kWeights];
  alignas(64) Acc slopes[kTilePanels<Acc> * kWeights];  // of the softcap, where there is one
  KeyBlock<T> block;

  QueryPass(const AttentionBackwardParams& b, int64_t batch_index, int64_t head, int64_t group,
            int64_t row, int64_t end)
      : p(b.forward), see(Visibility(p, batch_index, head, group).of_rows(row)),
        rows(b, batch_index, head, group),
        grad_rows(query_rows<T>(contiguous(b.grad_q, p.heads_q, p.queries, p.head_dim), batch_index,
                                head, group)),
        batch(batch_index), kv_head(head * group / (p.heads_q / p.heads_kv)), first_row(row),
        end_row(end), panels(divide_up(end - row, kLanes)), stores_delta(b.delta) {
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
      if (stores_delta) *rows.delta[row] = delta[at];
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
    visit_grads(0, p.keys, [&](int64_t panel, int64_t count) {
      if (p.softcap > 0) multiply_by_slopes(weights, slopes, kWeights, count, block.count);
      add_gradient<kSkipZeros>(panel, count);
    });
  }

  // visit(panel, count) with ds of the rows of these panels and the keys of `block` in weights, for
  // all keys of [first, end).
  template <class Visit>
  void visit_grads(int64_t first, int64_t end, const Visit& visit) {
    end = min(see.limit(end_row - 1) + 1, end);
    const KeyPanels cut(see);
    for (int64_t key = first; key < end;) {
      key = block.choose(p, see, batch, kv_head, key, min(cut.end(key, kBlock), end));
      if (block.count > 0) visit_block(visit);
    }
  }

  template <class Visit>
  void visit_block(const Visit& visit) {
    Coverage coverage[kMaxPanels];
    const bool any = cover_panels(panels, coverage, [&](int64_t panel) {
      return see.coverage(panel_row(panel), last_row(panel), block.first, block.last);
    });
    if (!any) return;
    block.pack(p, batch, kv_head);
    visit_panels<Acc>(panels, coverage, [&](int64_t panel, int64_t count) {
      weigh(panel, count, coverage + panel);
      make_grads(panel, count);
      visit(panel, count);
    });
  }

  // weights = p
  void weigh(int64_t panel, int64_t count, const Coverage* coverage) {
    const Acc* bias = p.softcap > 0 ? kNoBias<Acc> : block.bias;
    multiply<Layout::row_step>(
        block.k, p.head_dim, block.count, query + panel * p.head_dim * kLanes, p.head_dim * kLanes,
        count, p.head_dim, [&](int64_t key, int i, Vec<Acc> sum) {
          store(weights + i * kWeights + key * kLanes, sum + splat(bias[key]));
        });
    for (int64_t i = 0; i < count; ++i) {
      Acc* tile_weights = weights + i * kWeights;
      if (p.softcap > 0) {
        cap_logits(
            tile_weights, block.count, p.softcap,
            [&](int64_t key) { return splat(block.bias[key]); }, slopes + i * kWeights);
      }
      if (see.pair_bias.data) {
        bias_listed_keys(see, block.index, block.count, panel_row(panel + i), tile_weights);
      }
      if (coverage[i] == Coverage::some)
        hide_keys<T>(see, block, panel_row(panel + i), tile_weights);
      const Vec<Acc> base = load(lse + (panel + i) * kLanes);
      for (int64_t key = 0; key < block.count; ++key) {
        store(tile_weights + key * kLanes, weight_of(load(tile_weights + key * kLanes), base));
      }
    }
  }

  // weights = ds
  void make_grads(int64_t panel, int64_t count) {
    multiply<Layout::row_step>(
        block.v, p.value_dim, block.count, grad_out + panel * p.value_dim * kLanes,
        p.value_dim * kLanes, count, p.value_dim, [&](int64_t key, int i, Vec<Acc> sum) {
          Acc* at = weights + i * kWeights + key * kLanes;
          store(at, grad_of_logit(load(at), sum, load(delta + (panel + i) * kLanes)));
        });
  }

  // grad_query += ds k, with the ds of products
  template <bool kSkipZeros>
  void add_gradient(int64_t panel, int64_t count) {
    const KeyPanels cut(see);
    for (int64_t key = 0, next; key < block.count; key = next) {
      next = key + 1;
      const int64_t end = cut.end(block.index[key], kSummedInPlace<T> ? kLanes : kBlock);
      while (next < block.count && block.index[next] < end) ++next;
      add_products<kSkipZeros>(block.k + key * p.head_dim, p.head_dim, weights + key * kLanes,
                               kWeights, count, next - key,
                               grad_query + panel * p.head_dim * kLanes);
    }
  }
};

}  // namespace tokred::TOKRED_ISA
