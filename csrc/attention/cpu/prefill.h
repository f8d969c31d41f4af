// Attention of many query rows: online softmax (Milakov and Gimelshein, arXiv 1805.02867), by
// blocks of keys as in FlashAttention (arXiv 2205.14135), sixteen (query, head) rows a panel. A
// task owns up to eight panels of one kv head, so that a block of keys is read and converted once
// for all of them and for all heads of the group.
#pragma once

#include "attention/cpu/tile.h"
#include "common/cpu/parallel.h"

namespace tokred::TOKRED_ISA {

// Keys and values that lie in memory as they are.
struct PlainRows {
  template <class T>
  int64_t choose(KeyBlock<T>& block, const AttentionParams& p, const Visibility& see, int64_t batch,
                 int64_t kv_head, int64_t key, int64_t end) const {
    return block.choose(p, see, batch, kv_head, key, end);
  }
  template <class T>
  void pack(KeyBlock<T>& block, const AttentionParams& p, int64_t batch, int64_t kv_head) const {
    block.pack(p, batch, kv_head);
  }
  void rotate_query(const void*, int64_t) const {}
  void rotate_out(const void*, int64_t) const {}
};

// Source fills blocks of keys, as PlainRows does; where its keys are rotated it rotates the panels
// [dim][16] of queries as well, and those of the result back.
template <class T, class Source>
struct Forward {
  using Acc = Accumulator<T>;
  static constexpr int64_t kLogits = kBlock * kLanes;

  const Source& source;
  const AttentionParams& p;
  const Visibility see;
  const int64_t batch, head, kv_head, first_row, end_row, panels;
  alignas(64) Acc query[kPanelNumbers];   // [panel][head_dim][16], scaled
  alignas(64) Acc out[kPanelNumbers];     // [panel][value_dim][16]
  alignas(64) Acc top[kMaxPanels * kLanes];    // largest logit so far
  alignas(64) Acc total[kMaxPanels * kLanes];  // sum of exp(logit - top)
  alignas(64) Acc shrink[kMaxPanels * kLanes];
  alignas(64) Acc logits[kTilePanels<Acc> * kLogits];
  KeyBlock<T> block;

  // Rows [row, end) of the heads that `group` and h stand for; see Visibility.
  Forward(const Source& keys, const AttentionParams& params, int64_t b, int64_t h, int64_t group,
          int64_t row, int64_t end)
      : source(keys), p(params), see(Visibility(params, b, h, group).of_rows(row)), batch(b),
        head(h), kv_head(h * group / (p.heads_q / p.heads_kv)), first_row(row), end_row(end),
        panels(divide_up(end - row, kLanes)) {
    const auto rows = query_rows<const T>(p.q, batch, head, group);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t at = panel_row(panel);
      Acc* to = query + panel * p.head_dim * kLanes;
      pack_panel<T>([&](int lane) { return at + lane < end_row ? rows[at + lane] : nullptr; },
                    p.head_dim, static_cast<Acc>(p.scale), to);
      source.rotate_query(to, p.head_dim);
    }
  }

  int64_t panel_row(int64_t panel) const { return first_row + panel * kLanes; }
  int64_t last_row(int64_t panel) const { return min(panel_row(panel) + kLanes, end_row) - 1; }

  // A hidden key has weight 0, but 0 times an infinite value is NaN: a result with NaN is computed
  // again, without the products of weights of 0.
  void run() {
    attend<false>();
    if (any_nan(out, panels * p.value_dim * kLanes)) attend<true>();
    for (int64_t panel = 0; panel < panels; ++panel) finish(panel);
  }

  template <bool kSkipZeros>
  void attend() {
    for (int64_t i = 0; i < panels * p.value_dim * kLanes; ++i) out[i] = 0;
    for (int64_t i = 0; i < panels * kLanes; ++i) top[i] = -kInfinity<Acc>, total[i] = 0;
    const int64_t end = min(see.limit(end_row - 1) + 1, p.keys);
    for (int64_t key = 0; key < end;) {
      key = source.choose(block, p, see, batch, kv_head, key, end);
      if (block.count > 0) attend_block<kSkipZeros>();
    }
  }

  template <bool kSkipZeros>
  void attend_block() {
    Coverage coverage[kMaxPanels];
    const bool any = cover_panels(panels, coverage, [&](int64_t panel) {
      return see.coverage(panel_row(panel), last_row(panel), block.first, block.last);
    });
    if (!any) return;
    source.pack(block, p, batch, kv_head);
    const Acc* bias = p.softcap > 0 ? kNoBias<Acc> : block.bias;
    visit_panels<Acc>(panels, coverage, [&](int64_t panel, int64_t count) {
      multiply<Layout::row_step>(
          block.k, p.head_dim, block.count, query + panel * p.head_dim * kLanes,
          p.head_dim * kLanes, count, p.head_dim, [&](int64_t key, int i, Vec<Acc> sum) {
            store(logits + i * kLogits + key * kLanes, sum + splat(bias[key]));
          });
      for (int64_t i = 0; i < count; ++i) {
        Acc* tile_logits = logits + i * kLogits;
        if (p.softcap > 0) {
          cap_logits(tile_logits, block.count, p.softcap,
                     [&](int64_t key) { return splat(block.bias[key]); });
        }
        if (see.pair_bias.data) {
          bias_listed_keys(see, block.index, block.count, panel_row(panel + i), tile_logits);
        }
        if (coverage[panel + i] == Coverage::some) {
          hide_keys<T>(see, block, panel_row(panel + i), tile_logits);
        }
        exponentiate(tile_logits, (panel + i) * kLanes);
      }
      add_values<kSkipZeros>(panel, count);
    });
  }

  // Logits of a panel to weights exp(logit - top), after moving top. Not inlined, for the
  // sake of its registers.
  __attribute__((noinline)) void exponentiate(Acc* weights, int64_t lanes) {
    const int64_t count = block.count;
    const Vec<Acc> old_top = load(top + lanes);
    Vec<Acc> new_top = old_top;
    for (int64_t key = 0; key < count; ++key) {
      new_top = max(load(weights + key * kLanes), new_top);
    }
    store(top + lanes, new_top);
    const Vec<Acc> zero = splat(Acc{0});
    // A row that has seen nothing yet: exp(-inf - 0), not exp(-inf + inf).
    const Vec<Acc> base = select_greater(new_top, splat(-kInfinity<Acc>), new_top, zero);
    Vec<Acc> sum = zero;
    for (int64_t key = 0; key < count; ++key) {
      const Vec<Acc> weight = exp(load(weights + key * kLanes) - base);
      store(weights + key * kLanes, weight);
      sum = sum + weight;
    }
    const Vec<Acc> factor = exp(old_top - base);
    store(shrink + lanes, factor);
    store(total + lanes, fma(load(total + lanes), factor, sum));
  }

  template <bool kSkipZeros>
  void add_values(int64_t panel, int64_t count) {
    const auto add = [&](int64_t d, int64_t i, Vec<Acc> sum) {
      Acc* at = out + ((panel + i) * p.value_dim + d) * kLanes;
      store(at, fma(load(at), load(shrink + (panel + i) * kLanes), sum));
    };
    if constexpr (kSkipZeros) {
      multiply_nonzero<Layout::step_row>(block.v, p.value_dim, p.value_dim, logits, kLogits, count,
                                         block.count, add);
    } else {
      multiply<Layout::step_row>(block.v, p.value_dim, p.value_dim, logits, kLogits, count,
                                 block.count, add);
    }
  }

  void finish(int64_t panel) {
    Acc* numerator = out + panel * p.value_dim * kLanes;
    const Vec<Acc> zero = splat(Acc{0});
    const Vec<Acc> sum = load(total + panel * kLanes);
    const Vec<Acc> nothing = select_number(sum, zero, sum);
    for (int64_t d = 0; d < p.value_dim; ++d) {
      Acc* at = numerator + d * kLanes;
      store(at, select_greater(sum, zero, load(at) / sum, nothing));
    }
    source.rotate_out(numerator, p.value_dim);
    const int64_t count = last_row(panel) - panel_row(panel) + 1;
    const auto out_rows = query_rows<T>(p.out_view(), batch, head, see.group);
    const auto lse_rows =
        query_rows<Acc>(contiguous(p.lse, p.heads_q, p.queries, 1), batch, head, see.group);
    const int64_t row = panel_row(panel);
    unpack_panel<T>(numerator, count, p.value_dim, Acc{1},
                    [&](int64_t lane) { return out_rows[row + lane]; });
    for (int64_t lane = 0; lane < count; ++lane) {
      const Acc lane_total = total[panel * kLanes + lane];
      *lse_rows[row + lane] =
          lane_total == 0 ? -kInfinity<Acc> : top[panel * kLanes + lane] + std::log(lane_total);
    }
  }
};

// Calls f(item, head, group, row, end) for all rows, cut into tasks; see Visibility.
template <class F>
void each_task(const AttentionParams& p, const Parallel& parallel, const F& f) {
  const int64_t group = row_group(p), heads = p.heads_q / group, rows = p.queries * group;
  if (p.batch == 0 || rows == 0) return;
  const Tasks tasks(p, rows, Visibility(p, 0, 0, group).rows_in_strip(), parallel.threads);
  parallel_tasks(parallel, p.batch * heads * tasks.in_head, [&](int64_t task, int64_t) {
    // Under causality the last rows cost most: they go first.
    const int64_t head = task / tasks.in_head, part = tasks.in_head - 1 - task % tasks.in_head;
    const int64_t first = tasks.first(part), end = tasks.end(part);
    if (first < end) f(head / heads, head % heads, group, first, end);
  });
}

}  // namespace tokred::TOKRED_ISA
