// Front end of linear_assignment: checks, allocation, parameters, and the errors that only the
// kernel can find.
#pragma once

#include <vector>

#include "match/params.h"
#include "tensor.h"

namespace tokred {

// index i32 [B, N], row_dual f64 [B, N], column_dual f64 [B, M]; see LinearAssignmentParams. With
// `check`, on the host, an item without an assignment is an error.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> linear_assignment(const Tensor& cost, bool maximize,
                                                     bool check) {
  constexpr int64_t kMaxLines = 1 << 24;
  LinearAssignmentParams p{};
  p.dtype = float_dtype(cost, "cost", Backend::kDouble);
  check_dim(cost, "cost", 3, "[B, N, M]");
  check_last_contiguous(cost, "cost");
  p.cost = cost.const_data_ptr();
  p.stride_batch = cost.stride(0);
  p.stride_row = cost.stride(1);
  p.batch = cost.size(0);
  p.rows = cost.size(1);
  p.columns = cost.size(2);
  TOKRED_CHECK(p.rows <= kMaxLines && p.columns <= kMaxLines,
               "cost may have at most 2^24 rows and columns, got shape ", shape_string(cost));
  p.maximize = maximize;

  Backend backend(cost);
  Tensor index = allocate(cost, {p.batch, p.rows}, ScalarType::Int);
  Tensor row_dual = allocate(cost, {p.batch, p.rows}, ScalarType::Double);
  Tensor column_dual = allocate(cost, {p.batch, p.columns}, ScalarType::Double);
  Scratch workspace(cost, backend.linear_assignment_workspace(p), Backend::kHost);
  p.index = static_cast<int32_t*>(index.mutable_data_ptr());
  p.row_dual = static_cast<double*>(row_dual.mutable_data_ptr());
  p.column_dual = static_cast<double*>(column_dual.mutable_data_ptr());
  p.workspace = workspace.data();
  std::vector<AssignmentFailure> failures(Backend::kHost && check ? p.batch : 0);
  p.failure = failures.empty() ? nullptr : failures.data();
  if (p.batch > 0) backend.linear_assignment(p);
  for (size_t item = 0; item < failures.size(); ++item) {
    const AssignmentFailure& failure = failures[item];
    TOKRED_CHECK(failure.kind != AssignmentFailure::kInvalid, "cost of item ", item, ", row ",
                 failure.row, ", column ", failure.column, " must be a number below 2^960 or ",
                 maximize ? "-inf (a forbidden pair, with maximize)" : "inf (a forbidden pair)",
                 ", and is not");
    TOKRED_CHECK(failure.kind != AssignmentFailure::kInfeasible,
                 "cost forbids too many pairs: in item ", item, ", ",
                 failure.row >= 0 ? "row " : "column ",
                 failure.row >= 0 ? failure.row : failure.column,
                 " finds no partner once the others have theirs; check=False marks such an item "
                 "with -1");
  }
  return moved(index, row_dual, column_dual);
}

}  // namespace tokred
