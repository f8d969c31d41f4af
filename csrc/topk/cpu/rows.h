// Rows of the views that the topk ops read: addresses, numbers beside rows, rows of a task.
#pragma once

#include "common/cpu/storage.h"
#include "common/cpu/workspace.h"
#include "topk/params.h"

namespace tokred::TOKRED_ISA {

// The first element of row r, or null where there is no such tensor.
template <class T>
TOKRED_INLINE const T* row_start(const RowView& view, int64_t r) {
  if (!view.data) return nullptr;
  // Most often there is one dimension of rows; two divisions cost as much as a pass over a short
  // row.
  if (r < view.size[2]) return static_cast<const T*>(view.data) + r * view.stride[2];
  const int64_t last = r % view.size[2], rest = r / view.size[2];
  return static_cast<const T*>(view.data) + rest / view.size[1] * view.stride[0] +
         rest % view.size[1] * view.stride[1] + last * view.stride[2];
}

// The number beside row r in [0, limit]; the limit where there is none.
TOKRED_INLINE int64_t row_number(const RowView& view, int64_t r, int64_t limit) {
  if (!view.data) return limit;
  const int64_t number = *row_start<int32_t>(view, r);
  return number < 0 ? 0 : number < limit ? number : limit;
}

// Rows of one task: about 32768 elements, so that tasks are not short. 114 rows of 289 columns.
TOKRED_INLINE int64_t rows_per_task(int64_t columns) {
  constexpr int64_t kElements = 32768;
  return columns < kElements ? kElements / (columns + 1) + 1 : 1;
}

}  // namespace tokred::TOKRED_ISA
