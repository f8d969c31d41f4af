// Views of rows, for the front ends of the topk ops: their inputs, numbers beside them, outputs.
#pragma once

#include <limits>

#include "tensor.h"
#include "topk/params.h"

namespace tokred {

// The rows of t [.., N]: its dimensions but the last, right-aligned in a RowView.
inline RowView row_view(const Tensor& t, const char* name) {
  TOKRED_CHECK(t.dim() >= 1 && t.dim() <= kMaxRowDims + 1, name, " must have 1 to ",
               kMaxRowDims + 1, " dimensions [.., N], got shape ", shape_string(t),
               "; flatten the leading ones");
  check_last_contiguous(t, name);
  TOKRED_CHECK(t.size(t.dim() - 1) <= std::numeric_limits<int32_t>::max(), name,
               " may have at most 2^31 - 1 columns, got ", t.size(t.dim() - 1));
  RowView view;
  view.data = t.const_data_ptr();
  const int64_t leading = t.dim() - 1;
  for (int64_t dim = 0; dim < leading; ++dim) {
    view.size[kMaxRowDims - leading + dim] = t.size(dim);
    view.stride[kMaxRowDims - leading + dim] = t.stride(dim);
  }
  return view;
}

inline int64_t row_count(const RowView& view) { return view.size[0] * view.size[1] * view.size[2]; }

// Numbers or masks beside the rows of `scores` [.., N]: `t` [..] (columns = -1) or [.., columns],
// each leading dimension the same or 1. Broadcast dimensions get stride 0.
inline RowView rows_beside(const OptionalTensor& t, const char* name, ScalarType type,
                           int64_t columns, const RowView& rows, const Tensor& scores) {
  if (!t) return {};
  const int64_t leading = scores.dim() - 1;
  const bool fits =
      t->dim() == leading + (columns >= 0) && (columns < 0 || t->size(leading) == columns);
  TOKRED_CHECK(fits, name, " must be ", columns < 0 ? "[..]" : "[.., N]", " beside scores ",
               shape_string(scores), ", got shape ", shape_string(*t));
  check_dtype(*t, name, type);
  check_same_device(*t, name, scores, "scores");
  if (columns >= 0) check_last_contiguous(*t, name);
  RowView view = rows;
  view.data = t->const_data_ptr();
  for (int64_t dim = 0; dim < leading; ++dim) {
    TOKRED_CHECK(t->size(dim) == scores.size(dim) || t->size(dim) == 1, name, " must have size ",
                 scores.size(dim), " or 1 in dimension ", dim, ", got shape ", shape_string(*t));
    view.stride[kMaxRowDims - leading + dim] = broadcast_stride(*t, dim);
  }
  return view;
}

// A fresh tensor with the leading dimensions of `like` and then `last`.
inline Tensor allocate_rows(const Tensor& like, std::initializer_list<int64_t> last,
                            ScalarType type) {
  int64_t shape[kMaxRowDims + 2];
  int64_t dims = 0;
  for (; dims < like.dim() - 1; ++dims) shape[dims] = like.size(dims);
  for (int64_t size : last) shape[dims++] = size;
  return allocate(like, shape, dims, type);
}

}  // namespace tokred
