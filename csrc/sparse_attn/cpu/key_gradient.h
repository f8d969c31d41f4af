// The gradients of keys, values and biases: every key owns its own.
#pragma once

#include "sparse_attn/cpu/gradient_rows.h"

namespace tokred::TOKRED_ISA {

// grad_k, grad_v and grad_bias of some keys. Lanes are keys; blocks of (query, head) rows stream
// past. With kWhole the keys' share is added to grad_q, which is still to be scaled.
template <class T, bool kWhole = false>
struct KeyPass {
  using Acc = Accumulator<T>;
  static constexpr int64_t kWeights = kBlock * kLanes;

  const AttentionBackwardParams& backward;
  const AttentionParams& p;
  const int64_t batch, kv_head, group, first_key, end_key, panels;
  Visibility see;  // of the heads whose rows stream past at the moment
  GradientRows<T> rows;
  Rows<T> grad_rows;
  bool dead[kMaxPanels];  // no row sees any of the panel's keys
  alignas(64) Acc key[kPanelNumbers];  // [panel][head_dim][16]
  alignas(64) Acc key_rows[kWhole ? kPanelNumbers : 1];  // [panel][ceil(head_dim / 16)][key][16]
  alignas(64) Acc value[kPanelNumbers];  // [panel][value_dim][16]
  alignas(64) Acc grad_key[kPanelNumbers];
  alignas(64) Acc grad_value[kPanelNumbers];
  alignas(64) Acc bias[kMaxPanels * kLanes];
  alignas(64) Acc grad_bias[kMaxPanels * kLanes];
  alignas(64) Acc weights[kTilePanels<Acc> * kWeights];
  alignas(64) Acc slopes[kTilePanels<Acc> * kWeights];  // of the softcap, where there is one
  int64_t block_count, block_row[kBlock];
  alignas(64) Acc lse[kBlock];
  alignas(64) Acc delta[kBlock];
  alignas(64) Acc q[kBlock * kMaxWideDim];  // scaled
  alignas(64) Acc grad_out[kBlock * kMaxWideDim];

  // Keys [first, end) of a kv head.
  KeyPass(const AttentionBackwardParams& b, int64_t batch_index, int64_t head, int64_t rows_group,
          int64_t first, int64_t end)
      : backward(b), p(b.forward), batch(batch_index), kv_head(head), group(rows_group),
        first_key(first), end_key(end), panels(divide_up(end - first, kLanes)),
        see(p, batch, 0, group), rows(b, batch, 0, group) {}

  Rows<T> grad_rows_of(int64_t head) const {
    return query_rows<T>(contiguous(backward.grad_q, p.heads_q, p.queries, p.head_dim), batch, head,
                         group);
  }

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
    pack_panel<T>(lanes_of(p.k), p.head_dim, Acc{1}, key + panel * p.head_dim * kLanes);
    if constexpr (kWhole) load_key_rows(panel, lanes_of(p.k));
    pack_panel<T>(lanes_of(p.v), p.value_dim, Acc{1}, value + panel * p.value_dim * kLanes);
    dead[panel] = true;
    for (int lane = 0; lane < kLanes; ++lane) {
      bias[panel * kLanes + lane] =
          visible(lane) ? key_bias<Acc>(p, batch, kv_head, first + lane) : -kInfinity<Acc>;
      dead[panel] = dead[panel] && !visible(lane);
    }
  }

  template <class Row>
  void load_key_rows(int64_t panel, const Row& row) {
    Acc* to = key_rows + panel * channel_groups() * kLanes * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const T* from = row(lane);
      for (int64_t d = 0; d < p.head_dim; d += kLanes) {
        store(to + (d + lane) * kLanes, from ? load_row(from + d, p.head_dim - d) : splat(Acc{0}));
      }
    }
  }
  int64_t channel_groups() const { return divide_up(p.head_dim, kLanes); }

  void run() {
    add_rows<false>();
    if (has_nan()) add_rows<true>();
    write();
  }
  bool has_nan() const {
    return any_nan(grad_key, panels * p.head_dim * kLanes) ||
           any_nan(grad_value, panels * p.value_dim * kLanes);
  }

  template <bool kSkipZeros>
  void add_rows() {
    for (int64_t i = 0; i < panels * p.head_dim * kLanes; ++i) grad_key[i] = 0;
    for (int64_t i = 0; i < panels * p.value_dim * kLanes; ++i) grad_value[i] = 0;
    for (int64_t i = 0; i < panels * kLanes; ++i) grad_bias[i] = 0;
    const int64_t shares = p.heads_q / p.heads_kv / group;
    for (int64_t head = kv_head * shares; head < (kv_head + 1) * shares; ++head) {
      see = Visibility(p, batch, head, group).of_keys(first_key);
      rows = GradientRows<T>(backward, batch, head, group);
      grad_rows = grad_rows_of(head);
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
      for (int64_t d = 0; d < p.head_dim; ++d) q[i * p.head_dim + d] *= static_cast<Acc>(p.scale);
      pack_row(rows.grad_out[row], p.value_dim, grad_out + i * p.value_dim);
    }
  }

  // weights = p
  void weigh(int64_t panel, int64_t count, const Coverage* coverage) {
    const Acc* added = p.softcap > 0 ? kNoBias<Acc> : bias + panel * kLanes;
    multiply<Layout::row_step>(
        q, p.head_dim, block_count, key + panel * p.head_dim * kLanes, p.head_dim * kLanes, count,
        p.head_dim, [&](int64_t row, int i, Vec<Acc> sum) {
          store(weights + i * kWeights + row * kLanes, sum + load(added + i * kLanes));
        });
    for (int64_t i = 0; i < count; ++i) {
      Acc* tile_weights = weights + i * kWeights;
      if (p.softcap > 0) {
        const Vec<Acc> of_keys = load(bias + (panel + i) * kLanes);
        cap_logits(
            tile_weights, block_count, p.softcap, [&](int64_t) { return of_keys; },
            slopes + i * kWeights);
      }
      if (see.pair_bias.data) {
        bias_listed_rows(see, block_row, block_count, panel_key(panel + i), tile_weights);
      }
      if (coverage[i] == Coverage::some) {
        hide_listed_rows(see, block_row, block_count, panel_key(panel + i), tile_weights);
      }
      for (int64_t row = 0; row < block_count; ++row) {
        Acc* at = tile_weights + row * kLanes;
        store(at, weight_of(load(at), splat(lse[row])));
      }
    }
  }

  // grad_value += p^T grad_out, weights = ds, grad_bias += the sums of ds, grad_key += ds^T q with
  // the ds of products
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
    for (int64_t i = 0; i < count; ++i) {
      Vec<Acc> sum = splat(Acc{0});
      for (int64_t row = 0; row < block_count; ++row) {
        sum = sum + load(weights + i * kWeights + row * kLanes);
      }
      Acc* at = grad_bias + (panel + i) * kLanes;
      store(at, load(at) + sum);
    }
    if (p.softcap > 0) multiply_by_slopes(weights, slopes, kWeights, count, block_count);
    add_products<kSkipZeros>(q, p.head_dim, weights, kWeights, count, block_count,
                             grad_key + panel * p.head_dim * kLanes);
    if constexpr (kWhole) {
      for (int64_t i = 0; i < count; ++i) add_grad_query<kSkipZeros>(panel + i, i);
    }
  }

  // grad_query += ds k, of a panel's sixteen keys
  template <bool kSkipZeros>
  void add_grad_query(int64_t panel, int64_t tile_panel) {
    constexpr int64_t kGroup = kLanes * kLanes;
    const Acc* grad_logits = weights + tile_panel * kWeights;
    const Acc* keys = key_rows + panel * channel_groups() * kGroup;
    const auto add = [&](int64_t row, int64_t group_index, Vec<Acc> sum) {
      const int64_t d = group_index * kLanes;
      T* at = grad_rows[block_row[row]] + d;
      store_row(at, load_row(at, p.head_dim - d) + sum, p.head_dim - d);
    };
    for (int64_t first = 0; first < channel_groups(); first += kTilePanels<Acc>) {
      const int64_t count = min(kTilePanels<Acc>, channel_groups() - first);
      if constexpr (kSkipZeros) {
        for (int64_t i = 0; i < count * block_count; ++i) {
          const int64_t row = i % block_count, group_index = first + i / block_count;
          Vec<Acc> sum = splat(Acc{0});
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            const Acc x = grad_logits[row * kLanes + lane];
            if (x != 0) sum = fma(splat(x), load(keys + group_index * kGroup + lane * kLanes), sum);
          }
          add(row, group_index, sum);
        }
      } else {
        multiply<Layout::row_step>(
            grad_logits, kLanes, block_count, keys + first * kGroup, kGroup, count, kLanes,
            [&](int64_t row, int i, Vec<Acc> sum) { add(row, first + i, sum); });
      }
    }
  }

  void write() {
    for (int64_t panel = 0; panel < panels; ++panel) write_panel(panel);
  }
  void write_panel(int64_t panel) {
    const int64_t count = last_key(panel) - panel_key(panel) + 1;
    const int64_t first = (batch * p.heads_kv + kv_head) * p.keys + panel_key(panel);
    unpack_panel<T>(grad_key + panel * p.head_dim * kLanes, count, p.head_dim, Acc{1},
                    [&](int64_t lane) {
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

}  // namespace tokred::TOKRED_ISA
