// unmerge and compose: gathers by a token map, of rows and of the entries of another map. unmerge,
// [64, 561, 768] -> 577 in fp32, reads 110 MB and writes 113 MB, past the caches.
#include "common/cpu/copy.h"
#include "common/cpu/parallel.h"
#include "common/cpu/storage.h"
#include "merge/params.h"

namespace tokred::TOKRED_ISA {

void unmerge(const UnmergeParams& p, const Parallel& parallel) {
  constexpr int64_t kRows = 64;
  const int64_t chunks = (p.tokens + kRows - 1) / kRows;
  visit_dtype(p.dtype, [&]<class T>() {
    const bool stream =
        p.batch * p.tokens * p.channels * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
    parallel_tasks(parallel, p.batch * chunks, [&](int64_t task, int64_t) {
      const int64_t item = task / chunks, first = task % chunks * kRows;
      const int64_t last = first + kRows < p.tokens ? first + kRows : p.tokens;
      for (int64_t i = first; i < last; ++i) {
        T* x = static_cast<T*>(p.x) + (item * p.tokens + i) * p.channels;
        const int64_t slot = p.token_map[item * p.map_stride_batch + i * p.map_stride_token];
        if (slot >= 0 && slot < p.num_out) {
          const T* y = static_cast<const T*>(p.y) + item * p.y_stride_batch;
          copy_row(x, y + slot * p.y_stride_token, p.channels, stream);
        } else {
          fill_zero(x, p.channels * static_cast<int64_t>(sizeof(T)));
        }
      }
      if (stream) stream_fence();
    });
  });
}

void compose(const ComposeParams& p, const Parallel& parallel) {
  parallel_tasks(parallel, p.batch, [&](int64_t item, int64_t) {
    for (int64_t i = 0; i < p.tokens; ++i) {
      const int64_t slot = p.first[item * p.first_stride_batch + i * p.first_stride_token];
      const bool kept = slot >= 0 && slot < p.num_out;
      p.out[item * p.tokens + i] =
          kept ? p.second[item * p.second_stride_batch + slot * p.second_stride_token] : -1;
    }
  });
}

}  // namespace tokred::TOKRED_ISA
