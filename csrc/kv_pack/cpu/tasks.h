// Tasks of the packing ops: how many tokens each, on how many threads, and the heads they work on.
#pragma once

#include "common/cpu/parallel.h"
#include "common/cpu/sizes.h"
#include "kv_pack/cpu/groups.h"
#include "kv_pack/params.h"

namespace tokred::TOKRED_ISA {

// Tokens of a task: about 16384 numbers, 128 tokens of D = 128; along tokens whole groups.
inline int64_t tokens_per_task(const PackFormat& f) {
  constexpr int64_t kTaskFloats = 16384;
  const int64_t tokens = kTaskFloats / f.head_dim;
  if (f.axis == GroupAxis::channel) return tokens;
  return tokens > f.group_size ? tokens / f.group_size * f.group_size : f.group_size;
}

// Waking threads takes longer than packing a few thousand numbers: up to 256 tokens of D = 128 stay
// on the calling one.
inline Parallel threads_for(int64_t numbers, Parallel parallel) {
  if (numbers < 32768) parallel.threads = 1;
  return parallel;
}

template <class T>
const T* head_start(const HeadTensor& x, int64_t batch, int64_t head) {
  return static_cast<const T*>(x.data) + batch * x.stride_batch + head * x.stride_head;
}

// f(batch, head, first, last) for the tokens of every task.
template <class F>
void for_parts(const PackedRows& packed, int64_t batch, int64_t heads, const Parallel& parallel,
               const F& f) {
  const int64_t step = tokens_per_task(packed.format), parts = divide_up(packed.rows, step);
  const int64_t numbers = batch * heads * packed.rows * packed.format.head_dim;
  const Parallel threads = threads_for(numbers, parallel);
  parallel_tasks(threads, batch * heads * parts, [&](int64_t task, int64_t) {
    const int64_t row = task / parts, first = task % parts * step;
    const int64_t last = first + step < packed.rows ? first + step : packed.rows;
    f(row / heads, row % heads, first, last);
  });
}

// One head of a packed tensor.
struct PackedHead {
  uint8_t* codes;
  uint16_t* params;
  Levels levels;
};
TOKRED_INLINE PackedHead packed_head(const PackedRows& p, int64_t batch, int64_t head) {
  return {p.codes + batch * p.codes_stride_batch + head * p.codes_stride_head,
          p.params + batch * p.params_stride_batch + head * p.params_stride_head, Levels(p, head)};
}

}  // namespace tokred::TOKRED_ISA
