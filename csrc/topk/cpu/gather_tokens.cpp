// gather_tokens: rows of several tensors copied by one list of positions, past the caches where the
// results are large. It moves 2 * K * row_bytes: keys and values of 8 heads of 128 in bf16 at 2048
// tokens are 17 MB.
#include "common/cpu/copy.h"
#include "common/cpu/parallel.h"
#include "common/cpu/sizes.h"
#include "topk/params.h"

namespace tokred::TOKRED_ISA {
namespace {

// Copies the listed rows [first, last) of one batch item and head.
void gather_rows(const GatherParams& p, const GatherItem& item, int64_t batch, int64_t head,
                 int64_t first, int64_t last, bool stream) {
  const int32_t* indices = p.indices + batch * p.index_stride_batch + head * p.index_stride_head;
  const char* source =
      static_cast<const char*>(item.source) + batch * item.stride_batch + head * item.stride_head;
  char* out = static_cast<char*>(item.out) + (batch * item.heads + head) * p.count * item.row_bytes;
  for (int64_t i = first; i < last; ++i) {
    const int64_t token = indices[i];
    if (token >= 0 && token < item.tokens) {
      copy_row(out + i * item.row_bytes, source + token * item.stride_token, item.row_bytes,
               stream);
    } else {
      fill_zero(out + i * item.row_bytes, item.row_bytes);
    }
  }
}

}  // namespace

void gather_tokens(const GatherParams& p, const Parallel& parallel) {
  constexpr int64_t kTaskBytes = 64 << 10;  // 256 rows of 256 bytes a task
  int64_t first_task[kMaxGatherItems + 1] = {}, step[kMaxGatherItems];
  for (int64_t n = 0; n < p.items; ++n) {
    const GatherItem& item = p.item[n];
    step[n] = kTaskBytes / (item.row_bytes + 1) + 1;
    const int64_t chunks = divide_up(p.count, step[n]);
    first_task[n + 1] = first_task[n] + p.batch * item.heads * chunks;
  }
  parallel_tasks(parallel, first_task[p.items], [&](int64_t task, int64_t) {
    int64_t n = 0;
    while (task >= first_task[n + 1]) ++n;
    const GatherItem& item = p.item[n];
    const int64_t chunks = divide_up(p.count, step[n]);
    const int64_t within = task - first_task[n], list = within / chunks;
    const int64_t first = within % chunks * step[n];
    const int64_t last = first + step[n] < p.count ? first + step[n] : p.count;
    const bool stream = p.batch * item.heads * p.count * item.row_bytes >= kStreamBytes;
    gather_rows(p, item, list / item.heads, list % item.heads, first, last, stream);
    if (stream) stream_fence();
  });
}

}  // namespace tokred::TOKRED_ISA
