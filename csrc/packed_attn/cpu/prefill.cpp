// packed_attention on the CPU for many queries: blocks of tokens are unpacked next to the core that
// multiplies them, once for up to 128 query rows.
#include "attention/cpu/prefill.h"
#include "common/cpu/hadamard.h"
#include "packed_attn/cpu/prefill.h"
#include "packed_attn/cpu/side.h"

namespace tokred::TOKRED_ISA {
namespace {

// rotate_row() of sixteen rows, the lanes of [dim][16].
void rotate_panel(float* panel, int64_t dim) {
  const int64_t size = hadamard_size(dim);
  for (int64_t step = 1; step < size; step *= 2) {
    for (int64_t d = 0; d < dim; ++d) {
      if (d & step) continue;
      float *low = panel + d * kLanes, *high = low + step * kLanes;
      const f32x16 a = load(low), b = load(high);
      store(low, a + b);
      store(high, a - b);
    }
  }
  const f32x16 scale = splat(inverse_root(size));
  for (int64_t i = 0; i < dim * kLanes; i += kLanes) store(panel + i, load(panel + i) * scale);
}

// The tokens of one kv head.
struct PackedTokens {
  const SideView k, v;

  template <class T>
  int64_t choose(KeyBlock<T>& block, const AttentionParams& p, const Visibility& see, int64_t item,
                 int64_t kv_head, int64_t token, int64_t end) const {
    return block.choose(p, see, item, kv_head, token, end, [&](int64_t i) {
      Place place;
      return !k.find(i, place) || !v.find(i, place);
    });
  }
  template <class T>
  void pack(KeyBlock<T>& block, const AttentionParams& p, int64_t item, int64_t kv_head) const {
    for (int64_t i = 0; i < block.count; ++i) {
      block.bias[i] = key_bias<float>(p, item, kv_head, block.index[i]);
      Place place;
      if (k.find(block.index[i], place)) unpack_token(k, place, block.k + i * p.head_dim);
      if (v.find(block.index[i], place)) unpack_token(v, place, block.v + i * p.value_dim);
    }
  }
  void turn_query(float* panel, int64_t dim) const {
    if (k.format.rotated) rotate_panel(panel, dim);
  }
  void turn_out(float* panel, int64_t dim) const {
    if (v.format.rotated) rotate_panel(panel, dim);
  }
};

}  // namespace

void packed_attention_panels(const PackedAttentionParams& s, const Parallel& parallel) {
  visit_dtype(s.attention.dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 8) return;
    else each_task(s.attention, parallel, [&](int64_t item, int64_t head, int64_t group,
                                              int64_t row, int64_t end) {
      const AttentionParams p = item_params(s, item);
      const PackedTokens tokens{SideView(s.k, p.k, s.slots, p.dtype, p.keys, item, head),
                                SideView(s.v, p.v, s.slots, p.dtype, p.keys, item, head)};
      Forward<T, PackedTokens>(tokens, p, item, head, group, row, end).run();
    });
  });
}

}  // namespace tokred::TOKRED_ISA
