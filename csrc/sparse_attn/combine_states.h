// Front end of combine_states, the merge of attention over two disjoint sets of keys.
#pragma once

#include "attention/inputs.h"
#include "sparse_attn/params.h"

namespace tokred {

// out [B, H, L, D], lse [B, H, L]; see CombineParams.
template <class Backend>
std::tuple<Tensor, Tensor> combine_states(const Tensor& out_a, const Tensor& lse_a,
                                          const Tensor& out_b, const Tensor& lse_b) {
  CombineParams p{};
  p.dtype = float_dtype(out_a, "out_a", Backend::kDouble);
  for (const auto& [out, name] : {std::pair(&out_a, "out_a"), std::pair(&out_b, "out_b")}) {
    check_dim(*out, name, 4, "[B, H, L, D]");
    check_last_contiguous(*out, name);
    check_same_dtype(*out, name, out_a, "out_a");
    check_same_device(*out, name, out_a, "out_a");
    check_shape(*out, name, {out_a.size(0), out_a.size(1), out_a.size(2), out_a.size(3)},
                "[B, H, L, D]");
  }
  for (const auto& [lse, name] : {std::pair(&lse_a, "lse_a"), std::pair(&lse_b, "lse_b")}) {
    check_shape(*lse, name, {out_a.size(0), out_a.size(1), out_a.size(2)}, "[B, H, L]");
    check_dtype(*lse, name, accumulator_type(out_a));
    check_same_device(*lse, name, out_a, "out_a");
    TOKRED_CHECK(lse->is_contiguous(), name, " must be contiguous, got strides of a view");
  }
  p.out_a = head_tensor(out_a);
  p.out_b = head_tensor(out_b);
  p.lse_a = lse_a.const_data_ptr();
  p.lse_b = lse_b.const_data_ptr();
  p.batch = out_a.size(0);
  p.heads = out_a.size(1);
  p.queries = out_a.size(2);
  p.dim = out_a.size(3);
  Backend backend(out_a);
  Tensor out = allocate(out_a, {p.batch, p.heads, p.queries, p.dim}, out_a.scalar_type());
  Tensor lse = allocate(out_a, {p.batch, p.heads, p.queries}, accumulator_type(out_a));
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  backend.combine_states(p);
  return moved(out, lse);
}

}  // namespace tokred
