// Front ends of the topk stem: checks, allocation, parameters. Compiled for every backend.
#pragma once

#include <algorithm>
#include <cmath>
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

inline int64_t row_count(const RowView& view) {
  return view.size[0] * view.size[1] * view.size[2];
}

// Numbers or masks beside the rows of `scores` [.., N]: `t` [..] (columns = -1) or [.., columns],
// each leading dimension the same or 1. Broadcast dimensions get stride 0.
inline RowView rows_beside(const OptionalTensor& t, const char* name, ScalarType type,
                           int64_t columns, const RowView& rows, const Tensor& scores) {
  if (!t) return {};
  const int64_t leading = scores.dim() - 1;
  const bool fits = t->dim() == leading + (columns >= 0) &&
                    (columns < 0 || t->size(leading) == columns);
  TOKRED_CHECK(fits, name, " must be ", columns < 0 ? "[..]" : "[.., N]", " beside scores ",
               shape_string(scores), ", got shape ", shape_string(*t));
  check_dtype(*t, name, type);
  check_same_device(*t, name, scores, "scores");
  if (columns >= 0) check_last_contiguous(*t, name);
  RowView view = rows;
  view.data = t->const_data_ptr();
  for (int64_t dim = 0; dim < leading; ++dim) {
    TOKRED_CHECK(t->size(dim) == scores.size(dim) || t->size(dim) == 1, name,
                 " must have size ", scores.size(dim), " or 1 in dimension ", dim,
                 ", got shape ", shape_string(*t));
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

inline RowOrder parse_row_order(std::string_view name) {
  return parse_choice<RowOrder>(
      name, "order", {{"score", RowOrder::score}, {"position", RowOrder::position}});
}

// values f32 [.., k], indices i32 [.., k], counts i32 [..], with block_size > 0 a dimension of
// segments before the last; see TopkParams.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> topk(
    const Tensor& scores, int64_t k, const OptionalTensor& lengths, const Text& order,
    const OptionalTensor& row_k, int64_t num_sinks, int64_t num_locals,
    const OptionalTensor& must_keep, std::optional<double> top_p, int64_t min_k,
    std::optional<double> threshold, int64_t block_size) {
  TopkParams p{};
  p.dtype = float_dtype(scores, "scores", false);
  p.scores = row_view(scores, "scores");
  p.order = parse_row_order(order);
  TOKRED_CHECK(k >= 0 && k <= std::numeric_limits<int32_t>::max(),
               "k must be between 0 and 2^31 - 1, got ", k);
  TOKRED_CHECK(num_sinks >= 0, "num_sinks must be at least 0, got ", num_sinks);
  TOKRED_CHECK(num_locals >= 0, "num_locals must be at least 0, got ", num_locals);
  TOKRED_CHECK(min_k >= 0, "min_k must be at least 0, got ", min_k);
  TOKRED_CHECK(block_size >= 0, "block_size must be at least 0 (0: no blocks), got ", block_size);
  TOKRED_CHECK(!top_p || std::isfinite(*top_p), "top_p must be finite, got ", *top_p);
  TOKRED_CHECK(!threshold || !std::isnan(*threshold), "threshold must not be NaN");
  p.rows = row_count(p.scores);
  p.columns = scores.size(scores.dim() - 1);
  p.k = k;
  p.lengths = rows_beside(lengths, "lengths", ScalarType::Int, -1, p.scores, scores);
  p.row_k = rows_beside(row_k, "row_k", ScalarType::Int, -1, p.scores, scores);
  p.must_keep =
      rows_beside(must_keep, "must_keep", ScalarType::Bool, p.columns, p.scores, scores);
  p.block_size = std::min(block_size, std::max<int64_t>(p.columns, 1));
  p.segments =
      block_size > 0 ? std::max<int64_t>(1, (p.columns + p.block_size - 1) / p.block_size) : 1;
  p.num_sinks = std::min(num_sinks, p.columns);
  p.num_locals = std::min(num_locals, p.columns);
  p.has_top_p = top_p.has_value();
  p.top_p = top_p.value_or(0.0);
  p.min_k = std::min(min_k, p.columns);
  p.has_threshold = threshold.has_value();
  p.threshold = static_cast<float>(threshold.value_or(0.0));

  Backend backend(scores);
  const auto output = [&](ScalarType type) {
    return block_size > 0 ? allocate_rows(scores, {p.segments, k}, type)
                          : allocate_rows(scores, {k}, type);
  };
  Tensor values = output(ScalarType::Float), indices = output(ScalarType::Int);
  Tensor counts = block_size > 0 ? allocate_rows(scores, {p.segments}, ScalarType::Int)
                                 : allocate_rows(scores, {}, ScalarType::Int);
  p.values = static_cast<float*>(values.mutable_data_ptr());
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  if (p.rows > 0) {
    Scratch workspace(scores, backend.topk_workspace(p), Backend::kHost);
    p.workspace = workspace.data();
    backend.topk(p);
  }
  return {values, indices, counts};
}

// indices i32 [.., capacity or N], counts i32 [..]; see CompactParams.
template <class Backend>
std::tuple<Tensor, Tensor> compact(const Tensor& selected, std::optional<double> threshold,
                                   std::optional<int64_t> capacity,
                                   const OptionalTensor& lengths) {
  CompactParams p{};
  p.is_bool = selected.scalar_type() == ScalarType::Bool;
  TOKRED_CHECK(p.is_bool != threshold.has_value(), "threshold must be given where selected holds ",
               "scores, and only there: selected is ", dtype_name(selected.scalar_type()));
  TOKRED_CHECK(!threshold || !std::isnan(*threshold), "threshold must not be NaN");
  if (!p.is_bool) p.dtype = float_dtype(selected, "selected", false);
  p.selected = row_view(selected, "selected");
  p.rows = row_count(p.selected);
  p.columns = selected.size(selected.dim() - 1);
  p.capacity = capacity.value_or(p.columns);
  TOKRED_CHECK(p.capacity >= 0 && p.capacity <= std::numeric_limits<int32_t>::max(),
               "capacity must be between 0 and 2^31 - 1, got ", p.capacity);
  p.lengths = rows_beside(lengths, "lengths", ScalarType::Int, -1, p.selected, selected);
  p.threshold = static_cast<float>(threshold.value_or(0.0));
  Backend backend(selected);
  Tensor indices = allocate_rows(selected, {p.capacity}, ScalarType::Int);
  Tensor counts = allocate_rows(selected, {}, ScalarType::Int);
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  if (p.rows > 0) backend.compact(p);
  return {indices, counts};
}

inline int64_t element_bytes(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char: return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
    case ScalarType::Short: return 2;
    case ScalarType::Float:
    case ScalarType::ComplexHalf:
    case ScalarType::Int: return 4;
    case ScalarType::Double:
    case ScalarType::ComplexFloat:
    case ScalarType::Long: return 8;
    case ScalarType::ComplexDouble: return 16;
    default: TOKRED_CHECK(false, name, " must be bool, an integer of 8 to 64 bits, a float of 16",
                          " to 64 bits or a complex number of these, got another dtype");
  }
  return 0;
}

// The dimensions after `token_dim` must be one run of memory.
inline int64_t token_row_bytes(const Tensor& t, const char* name, int64_t token_dim) {
  int64_t elements = 1;
  for (int64_t dim = t.dim() - 1; dim > token_dim; --dim) {
    TOKRED_CHECK(t.size(dim) <= 1 || elements == 0 || t.stride(dim) == elements, name,
                 " must be contiguous within a token, got stride ", t.stride(dim),
                 " in dimension ", dim, "; call .contiguous() where the copy is acceptable");
    elements *= t.size(dim);
  }
  return elements * element_bytes(t, name);
}

// t [B, N, ..] or [B, H, N, ..] as an item of a gather, and the tensor it is gathered into.
inline Tensor gather_item(GatherItem& item, const Tensor& t, const char* name, int64_t token_dim,
                          const Tensor& indices, int64_t count) {
  TOKRED_CHECK(token_dim == 1 || token_dim == 2, "token_dims must be 1 or 2, got ", token_dim);
  TOKRED_CHECK(t.dim() > token_dim && t.dim() <= 8, name, " must have ", token_dim + 1,
               " to 8 dimensions, got shape ", shape_string(t));
  check_same_device(t, name, indices, "indices");
  const bool has_heads = token_dim == 2;
  TOKRED_CHECK(t.size(0) == indices.size(0), name, " must have the batch size ", indices.size(0),
               " of indices, got shape ", shape_string(t));
  TOKRED_CHECK(indices.dim() == 2 || (has_heads && t.size(1) == indices.size(1)), name,
               " must have the heads of indices ", shape_string(indices),
               " in dimension 1 and its tokens in dimension 2, got shape ", shape_string(t),
               " with token dimension ", token_dim);
  const int64_t bytes = element_bytes(t, name);
  item.row_bytes = token_row_bytes(t, name, token_dim);
  item.source = t.const_data_ptr();
  item.heads = has_heads ? t.size(1) : 1;
  item.tokens = t.size(token_dim);
  item.stride_batch = t.stride(0) * bytes;
  item.stride_head = has_heads ? t.stride(1) * bytes : 0;
  item.stride_token = t.stride(token_dim) * bytes;
  int64_t shape[8];
  for (int64_t dim = 0; dim < t.dim(); ++dim) shape[dim] = dim == token_dim ? count : t.size(dim);
  Tensor out = allocate(t, shape, t.dim(), t.scalar_type());
  item.out = out.mutable_data_ptr();
  return out;
}

// Every tensor at the tokens that indices i32 [B, K] or [B, H, K] name; see GatherParams.
template <class Backend>
std::vector<Tensor> gather_tokens(const std::vector<Tensor>& tensors, const Tensor& indices,
                                  const std::vector<int64_t>& token_dims) {
  GatherParams p{};
  TOKRED_CHECK(!tensors.empty() && static_cast<int64_t>(tensors.size()) <= kMaxGatherItems,
               "tensors must be 1 to ", kMaxGatherItems, " tensors, got ", tensors.size());
  TOKRED_CHECK(token_dims.size() == tensors.size(), "token_dims must have one entry a tensor, got ",
               token_dims.size(), " for ", tensors.size());
  TOKRED_CHECK(indices.dim() == 2 || indices.dim() == 3,
               "indices must be [B, K] or [B, H, K], got shape ", shape_string(indices));
  check_dtype(indices, "indices", ScalarType::Int);
  check_last_contiguous(indices, "indices");
  p.batch = indices.size(0);
  p.count = indices.size(indices.dim() - 1);
  p.indices = static_cast<const int32_t*>(indices.const_data_ptr());
  p.index_stride_batch = indices.stride(0);
  p.index_stride_head = indices.dim() == 3 ? indices.stride(1) : 0;
  Backend backend(indices);
  std::vector<Tensor> results;
  for (const Tensor& t : tensors) {
    const std::string name = "tensors[" + std::to_string(p.items) + "]";
    results.push_back(gather_item(p.item[p.items], t, name.c_str(),
                                  token_dims[static_cast<size_t>(p.items)], indices, p.count));
    const GatherItem& item = p.item[p.items];
    backend.will_write(item.out, p.batch * item.heads * p.count * item.row_bytes);
    ++p.items;
  }
  if (p.batch > 0 && p.count > 0) backend.gather_tokens(p);
  return results;
}

// indices i32 [.., num_samples], counts i32 [..]; see InverseTransformParams.
template <class Backend>
std::tuple<Tensor, Tensor> inverse_transform_sample(const Tensor& scores, int64_t num_samples,
                                                    const OptionalTensor& mask) {
  InverseTransformParams p{};
  p.dtype = float_dtype(scores, "scores", false);
  p.scores = row_view(scores, "scores");
  p.rows = row_count(p.scores);
  p.columns = scores.size(scores.dim() - 1);
  p.mask = rows_beside(mask, "mask", ScalarType::Bool, p.columns, p.scores, scores);
  TOKRED_CHECK(num_samples >= 0 && num_samples <= std::numeric_limits<int32_t>::max(),
               "num_samples must be between 0 and 2^31 - 1, got ", num_samples);
  p.num_samples = num_samples;
  Backend backend(scores);
  Tensor indices = allocate_rows(scores, {num_samples}, ScalarType::Int);
  Tensor counts = allocate_rows(scores, {}, ScalarType::Int);
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  if (p.rows > 0) {
    Scratch workspace(scores, backend.inverse_transform_sample_workspace(p), Backend::kHost);
    p.workspace = workspace.data();
    backend.inverse_transform_sample(p);
  }
  return {indices, counts};
}

}  // namespace tokred
