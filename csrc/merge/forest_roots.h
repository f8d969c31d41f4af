// Front end of forest_roots: checks, allocation, parameters.
#pragma once

#include "merge/token_map.h"

namespace tokred {

// root and children i32 [B, N]; see ForestRootsParams. On the CPU a cycle is an error.
template <class Backend>
std::tuple<Tensor, Tensor> forest_roots(const Tensor& parent) {
  ForestRootsParams p{};
  check_dim(parent, "parent", 2, "[B, N]");
  p.batch = parent.size(0);
  p.tokens = parent.size(1);
  check_map(parent, "parent", p.batch, p.tokens, parent, "parent");
  p.parent = static_cast<const int32_t*>(parent.const_data_ptr());
  p.parent_stride_batch = parent.stride(0);
  p.parent_stride_token = parent.stride(1);

  Backend backend(parent);
  Tensor root = allocate(parent, {p.batch, p.tokens}, ScalarType::Int);
  Tensor children = allocate(parent, {p.batch, p.tokens}, ScalarType::Int);
  p.root = static_cast<int32_t*>(root.mutable_data_ptr());
  p.children = static_cast<int32_t*>(children.mutable_data_ptr());
  OptionalTensor scratch;
  if constexpr (!Backend::kHost) {
    scratch = allocate(parent, {p.batch, p.tokens}, ScalarType::Int);
    p.scratch = static_cast<int32_t*>(scratch->mutable_data_ptr());
  }
  backend.forest_roots(p);
  if constexpr (Backend::kHost) {
    for (int64_t i = 0; i < p.batch * p.tokens; ++i) {
      TOKRED_CHECK(p.root[i] >= 0, "parent must be a forest, but in item ", i / p.tokens, " token ",
                   i % p.tokens, " leads into a cycle");
    }
  }
  return moved(root, children);
}

}  // namespace tokred
