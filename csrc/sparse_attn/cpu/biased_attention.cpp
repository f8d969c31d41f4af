// biased_attention on the CPU, and block_sparse_attention, the same kernel with a block mask: few
// query rows, and those of a single query, as sparse_attention over one list of all keys, others in
// panels (attention/cpu/prefill.h).
#include "attention/cpu/gather.h"
#include "attention/cpu/prefill.h"

namespace tokred::TOKRED_ISA {

int64_t sparse_attention_workspace(const SparseAttentionParams&, const Parallel&);
void sparse_attention(const SparseAttentionParams&, const Parallel&);

namespace {

// All keys in order, as the one list of all queries.
SparseAttentionParams over_all_keys(const AttentionParams& p) {
  return {p, KeyLists{nullptr, 0, 0, 0, 1, p.keys, p.queries > 0 ? p.queries : 1}, Rotation{}};
}

}  // namespace

int64_t biased_attention_workspace(const AttentionParams& p, const Parallel& parallel) {
  return is_decode(p) ? sparse_attention_workspace(over_all_keys(p), parallel) : 0;
}

void biased_attention(const AttentionParams& p, const Parallel& parallel) {
  if (is_decode(p)) return sparse_attention(over_all_keys(p), parallel);
  visit_dtype(p.dtype, [&]<class T>() {
    each_task(p, parallel,
              [&](int64_t item, int64_t head, int64_t group, int64_t row, int64_t end) {
                Forward<T, PlainRows>(PlainRows{}, p, item, head, group, row, end).run();
              });
  });
}

}  // namespace tokred::TOKRED_ISA
