// Shared by both passes of biased_attention's gradients: the rows that they read, sums of products,
// and how the sum of grad_q is cut.
#pragma once

#include <type_traits>

#include "attention/cpu/tile.h"
#include "sparse_attn/params.h"

namespace tokred::TOKRED_ISA {

// The rows of `group` heads, see Visibility, in everything that the gradients read.
template <class T>
struct GradientRows {
  using Acc = Accumulator<T>;
  Rows<const T> q, out, grad_out;
  Rows<const Acc> lse, grad_lse;
  Rows<Acc> delta;

  GradientRows(const AttentionBackwardParams& b, int64_t batch, int64_t head, int64_t group) {
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
    return dot_row(out[row], grad_out[row], dim) - *grad_lse[row];
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

// Gradients of logits [panel][step][16] to those of their products, through a softcap.
template <class Acc>
void multiply_by_slopes(Acc* grads, const Acc* slopes, int64_t stride, int64_t panels,
                        int64_t steps) {
  for (int64_t panel = 0; panel < panels; ++panel, grads += stride, slopes += stride) {
    for (int64_t i = 0; i < steps * kLanes; i += kLanes) {
      store(grads + i, grad_of_product(load(grads + i), load(slopes + i)));
    }
  }
}

// Whether grad_q is stored as it is summed, so that a KeyPass can add to it panel by panel: then it
// is a sum of sums over the sixteen keys of a panel, and one of sums over kBlock keys otherwise.
template <class T>
inline constexpr bool kSummedInPlace = std::is_same_v<T, Accumulator<T>>;

// The panels of KeyPass, which start anew in every strip.
struct KeyPanels {
  int64_t strip;

  explicit KeyPanels(const Visibility& see) : strip(max(see.keys_in_strip(), 1)) {}
  // The end of the `size` keys, some whole panels, that a key lies in.
  int64_t end(int64_t key, int64_t size) const {
    const int64_t first = key / strip * strip;
    return first + min(round_up(key - first + 1, size), strip);
  }
};

}  // namespace tokred::TOKRED_ISA
