// Front end of gather_tokens: checks, allocation, parameters.
#pragma once

#include "tensor.h"
#include "topk/params.h"

namespace tokred {

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
    default:
      TOKRED_CHECK(false, name, " must be bool, an integer of 8 to 64 bits, a float of 16",
                   " to 64 bits or a complex number of these, got another dtype");
  }
  return 0;
}

// The dimensions after `token_dim` must be one run of memory.
inline int64_t token_row_bytes(const Tensor& t, const char* name, int64_t token_dim) {
  int64_t elements = 1;
  for (int64_t dim = t.dim() - 1; dim > token_dim; --dim) {
    TOKRED_CHECK(t.size(dim) <= 1 || elements == 0 || t.stride(dim) == elements, name,
                 " must be contiguous within a token, got stride ", t.stride(dim), " in dimension ",
                 dim, "; call .contiguous() where the copy is acceptable");
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
    ++p.items;
  }
  if (p.batch > 0 && p.count > 0) backend.gather_tokens(p);
  return results;
}

}  // namespace tokred
