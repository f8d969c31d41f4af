// Panels and blocks of the attention kernels. Sixteen rows of one operand are the sixteen lanes of
// a "panel" [dim][16]; rows of the other operand stream past it as blocks [row][dim], broadcast one
// number at a time. So maxima, sums and exponentials are lane-wise, and no result depends on the
// register width.
#pragma once

#include "attention/cpu/pair_bias.h"
#include "common/cpu/register_tile.h"
#include "common/cpu/row.h"
#include "common/cpu/vexp.h"
#include "common/cpu/vtanh.h"

namespace tokred::TOKRED_ISA {

inline constexpr int64_t kMaxPanels = 8;
// The numbers of all panels of a task: 128 rows of up to 128 dimensions, 64 rows of up to 256, or
// 32 rows of up to 576.
inline constexpr int64_t kPanelNumbers = kMaxPanels / 4 * kLanes * kMaxWideDim;

// Panels that a task owns, fewer where the threads would otherwise go idle. Results do not depend
// on it: panels share nothing but the blocks they read.
inline int64_t panels_per_task(const AttentionParams& p, int64_t rows, int64_t threads) {
  const int64_t dim = max(p.head_dim, p.value_dim);
  int64_t panels = dim <= 128 ? kMaxPanels : dim <= 256 ? kMaxPanels / 2 : kMaxPanels / 4;
  while (panels > 2 && p.batch * p.heads_kv * divide_up(rows, panels * kLanes) < 4 * threads) {
    panels /= 2;
  }
  return panels;
}

// The rows (query, head of the group) of one kv head, the head changing fastest.
template <class T>
struct Rows {
  T* data;
  int64_t stride_token, stride_head, group;

  T* operator[](int64_t row) const {
    return data + row / group * stride_token + row % group * stride_head;
  }
};

template <class T>
TOKRED_INLINE Rows<T> query_rows(const HeadTensor& x, int64_t batch, int64_t kv_head,
                                 int64_t group) {
  T* data = static_cast<T*>(const_cast<void*>(x.data));
  return {data + batch * x.stride_batch + kv_head * group * x.stride_head, x.stride_token,
          x.stride_head, group};
}
TOKRED_INLINE HeadTensor contiguous(const void* data, int64_t heads, int64_t tokens, int64_t dim) {
  return {data, heads * tokens * dim, tokens * dim, dim};
}
template <class T>
TOKRED_INLINE const T* key_row(const HeadTensor& x, int64_t batch, int64_t head, int64_t key) {
  return static_cast<const T*>(x.data) + batch * x.stride_batch + head * x.stride_head +
         key * x.stride_token;
}

// The bias of a key, 0 where there is none.
template <class Acc>
TOKRED_INLINE Acc key_bias(const AttentionParams& p, int64_t batch, int64_t kv_head, int64_t key) {
  if (!p.key_bias) return 0;
  const int64_t offset = batch * p.bias_stride_batch + kv_head * p.bias_stride_head;
  return static_cast<const Acc*>(p.key_bias)[offset + key * p.bias_stride_key];
}

// How `count` rows (keys) of each of so many heads are cut into tasks of whole panels, none of
// which reaches into another strip.
struct Tasks {
  int64_t count, strip, panels, in_strip, in_head;

  Tasks(const AttentionParams& p, int64_t rows, int64_t strip_rows, int64_t threads)
      : count(rows), strip(max(strip_rows, 1)), panels(panels_per_task(p, rows, threads)) {
    const int64_t strip_panels = divide_up(strip, kLanes);
    in_strip = divide_up(strip_panels, panels);
    if (strip < count) panels = divide_up(strip_panels, in_strip);
    in_head = divide_up(count, strip) * in_strip;
  }
  int64_t first(int64_t task) const {
    return task / in_strip * strip + task % in_strip * panels * kLanes;
  }
  // May be less than the first, in the last strip.
  int64_t end(int64_t task) const {
    const int64_t strip_end = min((task / in_strip + 1) * strip, count);
    return min(first(task) + panels * kLanes, strip_end);
  }
};

// ---- Packing ------------------------------------------------------------------------------------

template <class T>
TOKRED_INLINE void unpack_row(const Accumulator<T>* from, int64_t dim, Accumulator<T> scale,
                              T* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store_as(to + d, load(from + d) * splat(scale));
  for (; d < dim; ++d) from_float(from[d] * scale, to[d]);
}

// row(lane), times `scale`, as the lanes of [dim][16]; a null row is 0.
template <class T, class Row>
TOKRED_INLINE void pack_panel(const Row& row, int64_t dim, Accumulator<T> scale,
                              Accumulator<T>* panel) {
  alignas(64) Accumulator<T> rows[kLanes * kMaxWideDim];
  for (int lane = 0; lane < kLanes; ++lane) {
    Accumulator<T>* to = rows + lane * dim;
    if (const T* from = row(lane)) {
      pack_row(from, dim, to);
    } else {
      for (int64_t d = 0; d < dim; ++d) to[d] = 0;
    }
  }
  for (int64_t i = 0; i < kLanes * dim; ++i) rows[i] *= scale;
  transpose(rows, kLanes, dim, panel);
}

// The first `count` lanes of [dim][16], times `scale`, as the rows row(lane).
template <class T, class Row>
TOKRED_INLINE void unpack_panel(const Accumulator<T>* panel, int64_t count, int64_t dim,
                                Accumulator<T> scale, const Row& row) {
  alignas(64) Accumulator<T> rows[kLanes * kMaxWideDim];
  transpose(panel, dim, kLanes, rows);
  for (int64_t lane = 0; lane < count; ++lane) unpack_row(rows + lane * dim, dim, scale, row(lane));
}

// The weight of a logit; exactly 0 of one that is hidden, even in a row whose lse is NaN.
template <class Acc>
TOKRED_INLINE Vec<Acc> weight_of(Vec<Acc> logit, Vec<Acc> lse) {
  return select_equal(logit, -kInfinity<Acc>, splat(Acc{0}), exp(logit - lse));
}
// The gradient of a logit; exactly 0 where the weight is, because the pair may be hidden.
template <class Acc>
TOKRED_INLINE Vec<Acc> grad_of_logit(Vec<Acc> weight, Vec<Acc> grad, Vec<Acc> delta) {
  return select_equal(weight, Acc{0}, weight, weight * (grad - delta));
}

// ---- Softcap ------------------------------------------------------------------------------------

// Biases of 0, added to products in place of the keys' where a softcap has to come before these.
template <class Acc>
alignas(64) inline constexpr Acc kNoBias[kBlock] = {};

// Products to logits softcap tanh(product) + bias(step), sixteen a step; where slopes is given,
// also the derivatives.
template <class Acc, class Bias>
__attribute__((noinline)) static void cap_logits(Acc* logits, int64_t steps, double softcap,
                                                 const Bias& bias, Acc* slopes = nullptr) {
  const Vec<Acc> cap = splat(static_cast<Acc>(softcap));
  for (int64_t i = 0; i < steps; ++i) {
    const Vec<Acc> x = tanh(load(logits + i * kLanes));
    store(logits + i * kLanes, fma(cap, x, bias(i)));
    if (slopes) store(slopes + i * kLanes, cap - cap * x * x);
  }
}

// The gradient of a product from that of its logit. A hidden pair may have a slope of NaN, and its
// gradient of 0 remains.
template <class Acc>
TOKRED_INLINE Vec<Acc> grad_of_product(Vec<Acc> grad, Vec<Acc> slope) {
  return select_number(slope, grad * slope, grad);
}

// ---- Blocks of keys -----------------------------------------------------------------------------

// Up to kBlock keys with their values and biases.
template <class T>
struct KeyBlock {
  using Acc = Accumulator<T>;
  int64_t count, first, last;
  int64_t index[kBlock];  // of the keys, ascending
  alignas(64) Acc bias[kBlock];
  alignas(64) Acc k[kBlock * kMaxWideDim];
  alignas(64) Acc v[kBlock * kMaxWideDim];

  // Takes the keys from `key` on that some row may see; returns where to go on. Keys of bias -inf,
  // and those that `hidden` hides, are left out.
  int64_t choose(const AttentionParams& p, const Visibility& see, int64_t batch, int64_t kv_head,
                 int64_t key, int64_t end) {
    return choose(p, see, batch, kv_head, key, end, [](int64_t) { return false; });
  }
  template <class Hidden>
  int64_t choose(const AttentionParams& p, const Visibility& see, int64_t batch, int64_t kv_head,
                 int64_t key, int64_t end, const Hidden& hidden) {
    const bool by_key = see.by_key(), by_bias = p.key_bias;
    key = choose_visible(
        see.key_blocks, key, end,
        [&](int64_t i) {
          return (by_key && !see.mask[i * see.stride_key]) ||
                 (by_bias && key_bias<Acc>(p, batch, kv_head, i) == -kInfinity<Acc>) || hidden(i);
        },
        index, count);
    if (count > 0) first = index[0], last = index[count - 1];
    return key;
  }
  void pack(const AttentionParams& p, int64_t batch, int64_t kv_head) {
    for (int64_t i = 0; i < count; ++i) {
      bias[i] = key_bias<Acc>(p, batch, kv_head, index[i]);
      pack_row(key_row<T>(p.k, batch, kv_head, index[i]), p.head_dim, k + i * p.head_dim);
      pack_row(key_row<T>(p.v, batch, kv_head, index[i]), p.value_dim, v + i * p.value_dim);
    }
  }
};

// Sets the logits [key of the block][16 rows from first_row on] that are hidden to -inf.
template <class T>
TOKRED_INLINE void hide_keys(const Visibility& see, const KeyBlock<T>& block, int64_t first_row,
                             Accumulator<T>* logits) {
  hide_listed_keys(see, block.index, block.count, first_row, logits);
}

// The same where up to kBlock rows are the block and the lanes are the keys from first_key on.
template <class T>
TOKRED_INLINE void hide_rows(const Visibility& see, int64_t first_row, int64_t count,
                             int64_t first_key, Accumulator<T>* logits) {
  int64_t rows[kBlock];
  for (int64_t i = 0; i < count; ++i) rows[i] = first_row + i;
  hide_listed_rows(see, rows, count, first_key, logits);
}

// coverage_of(panel) for each panel; whether any is visible at all.
template <class CoverageOf>
TOKRED_INLINE bool cover_panels(int64_t panels, Coverage (&coverage)[kMaxPanels],
                                const CoverageOf& coverage_of) {
  bool any = false;
  for (int64_t panel = 0; panel < panels; ++panel) {
    coverage[panel] = coverage_of(panel);
    any = any || coverage[panel] != Coverage::none;
  }
  return any;
}

// visit(panel, count) for the panels that are not hidden, `count` neighbours at a time, as many as
// a register tile has.
template <class Acc, class Visit>
TOKRED_INLINE void visit_panels(int64_t panels, const Coverage (&coverage)[kMaxPanels],
                                const Visit& visit) {
  for (int64_t panel = 0, count; panel < panels; panel += count) {
    count = 1;
    if (coverage[panel] == Coverage::none) continue;
    while (count < kTilePanels<Acc> && panel + count < panels &&
           coverage[panel + count] != Coverage::none) {
      ++count;
    }
    visit(panel, count);
  }
}

}  // namespace tokred::TOKRED_ISA
