// replace_token: a row of the keys and of the values of every head is copied.
#include "common/cpu/copy.h"
#include "common/cpu/parallel.h"
#include "common/cpu/sizes.h"
#include "topk/params.h"

namespace tokred::TOKRED_ISA {
namespace {

void replace_row(const ReplacedRows& rows, int64_t batch, int64_t head, int64_t slot) {
  copy_bytes(static_cast<char*>(rows.tokens) + batch * rows.stride_batch + head * rows.stride_head +
                 slot * rows.stride_token,
             static_cast<const char*>(rows.token) + batch * rows.token_stride_batch +
                 head * rows.token_stride_head,
             rows.row_bytes);
}

void replace_in_head(const ReplaceTokenParams& p, int64_t batch, int64_t head) {
  const int64_t slot = p.slot[batch * p.slot_stride_batch + head * p.slot_stride_head];
  if (slot < 0 || slot >= p.slots) return;
  replace_row(p.keys, batch, head, slot);
  replace_row(p.values, batch, head, slot);
  if (!p.position) return;
  p.position[batch * p.position_stride_batch + head * p.position_stride_head +
             slot * p.position_stride_token] = p.new_position;
}

}  // namespace

void replace_token(const ReplaceTokenParams& p, const Parallel& parallel) {
  constexpr int64_t kTaskBytes = 64 << 10;
  const int64_t step = kTaskBytes / (p.keys.row_bytes + p.values.row_bytes + 64) + 1;
  const int64_t rows = p.batch * p.heads;
  parallel_tasks(parallel, divide_up(rows, step), [&](int64_t task, int64_t) {
    for (int64_t row = task * step; row < min(rows, (task + 1) * step); ++row) {
      replace_in_head(p, row / p.heads, row % p.heads);
    }
  });
}

}  // namespace tokred::TOKRED_ISA
