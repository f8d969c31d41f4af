// biased_attention on the CPU.
#include "attention/cpu/decode.h"
#include "attention/cpu/prefill.h"
#include "common/cpu/parallel.h"

namespace tokred::TOKRED_ISA {

void biased_attention(const AttentionParams& p, const Parallel& parallel) {
  if (is_decode(p)) return sparse_attention(over_all_keys(p), parallel);
  visit_dtype(p.dtype, [&]<class T>() {
    each_task(p, parallel, [&](int64_t item, int64_t head, int64_t group, int64_t row,
                               int64_t end) {
      Forward<T, PlainRows>(PlainRows{}, p, item, head, group, row, end).run();
    });
  });
}

}  // namespace tokred::TOKRED_ISA
