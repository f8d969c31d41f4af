// Front ends of merge, merge_out and merge_backward: checks, allocation, parameters.
#pragma once

#include "common/overlap.h"
#include "merge/token_map.h"

namespace tokred {

inline MergeMode parse_merge_mode(std::string_view name) {
  constexpr std::string_view kNames[] = {"sum",  "mean",  "plain_mean", "amax",
                                         "amin", "prune", "maxnorm",    "halving"};
  for (int32_t i = 0; i < 8; ++i) {
    if (name == kNames[i]) return static_cast<MergeMode>(i);
  }
  TOKRED_CHECK(false,
               "mode must be one of sum, mean, plain_mean, amax, amin, prune, maxnorm, halving, ",
               "got '", std::string(name), "'");
  return MergeMode::sum;
}

// The inputs of a merge, checked; outputs and scratch are still to be set.
template <class Backend>
MergeParams merge_inputs(const Tensor& x, const Tensor& token_map, int64_t num_out,
                         const OptionalTensor& size, const OptionalTensor& weight,
                         const Text& mode) {
  MergeParams p{};
  p.mode = parse_merge_mode(mode);
  p.dtype = float_dtype(x, "x", Backend::kDouble);
  check_dim(x, "x", 3, "[B, N, C]");
  check_last_contiguous(x, "x");
  p.batch = x.size(0);
  p.tokens = x.size(1);
  p.channels = x.size(2);
  p.num_out = num_out;
  check_map(token_map, "token_map", p.batch, p.tokens, x, "x");
  TOKRED_CHECK(num_out >= 0 && num_out < std::numeric_limits<int32_t>::max(),
               "num_out must be between 0 and 2^31 - 2, got ", num_out);
  p.x = x.const_data_ptr();
  p.x_stride_batch = x.stride(0);
  p.x_stride_token = x.stride(1);
  p.token_map = static_cast<const int32_t*>(token_map.const_data_ptr());
  p.map_stride_batch = token_map.stride(0);
  p.map_stride_token = token_map.stride(1);
  p.size = token_table(size, "size", x, p.batch, p.tokens);
  p.weight = token_table(weight, "weight", x, p.batch, p.tokens);
  return p;
}

// Bytes for the members of every slot.
inline int64_t members_bytes(const MergeParams& p) {
  return p.batch * (p.num_out + 1 + p.tokens) * static_cast<int64_t>(sizeof(int32_t));
}
inline void set_members(MergeParams& p, void* memory) {
  p.indptr = static_cast<int32_t*>(memory);
  p.members = p.indptr + p.batch * (p.num_out + 1);
}

inline void set_merge_outputs(MergeParams& p, const Tensor& y, const Tensor& size_out) {
  p.y = y.mutable_data_ptr();
  p.y_stride_batch = y.stride(0);
  p.y_stride_token = y.stride(1);
  p.size_out = size_out.mutable_data_ptr();
  p.size_out_stride_batch = size_out.stride(0);
  p.size_out_stride_token = size_out.stride(1);
}

// y [B, M, C], size [B, M]; see MergeParams.
template <class Backend>
std::tuple<Tensor, Tensor> merge(const Tensor& x, const Tensor& token_map, int64_t num_out,
                                 const OptionalTensor& size, const OptionalTensor& weight,
                                 const Text& mode) {
  MergeParams p = merge_inputs<Backend>(x, token_map, num_out, size, weight, mode);
  Backend backend(x);
  Tensor y = allocate(x, {p.batch, num_out, p.channels}, x.scalar_type());
  Tensor size_out = allocate(x, {p.batch, num_out}, accumulator_type(x));
  set_merge_outputs(p, y, size_out);
  Scratch members(x, members_bytes(p), Backend::kHost);
  set_members(p, members.data());
  backend.merge(p);
  return moved(y, size_out);
}

template <class Backend>
void merge_out(const Tensor& x, const Tensor& token_map, const OptionalTensor& size,
               const OptionalTensor& weight, const Text& mode, const Tensor& out,
               const Tensor& out_size) {
  check_dim(out, "out", 3, "[B, M, C]");
  MergeParams p = merge_inputs<Backend>(x, token_map, out.size(1), size, weight, mode);
  check_shape(out, "out", {p.batch, p.num_out, p.channels}, "[B, M, C]");
  check_last_contiguous(out, "out");
  check_same_dtype(out, "out", x, "x");
  check_same_device(out, "out", x, "x");
  check_shape(out_size, "out_size", {p.batch, p.num_out}, "[B, M]");
  check_dtype(out_size, "out_size", accumulator_type(x));
  check_same_device(out_size, "out_size", x, "x");
  check_overlaps({{"out", out}, {"out_size", out_size}},
                 {{"x", x}, {"token_map", token_map}, {"size", size}, {"weight", weight}});
  set_merge_outputs(p, out, out_size);
  Backend backend(x);
  Scratch members(x, members_bytes(p), Backend::kHost);
  set_members(p, members.data());
  backend.merge(p);
}

// Gradients of x, size and weight; see MergeBackwardParams.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> merge_backward(const Tensor& grad_y, const Tensor& grad_size,
                                                  const Tensor& x, const Tensor& token_map,
                                                  const OptionalTensor& size,
                                                  const OptionalTensor& weight, const Text& mode,
                                                  bool only_x) {
  check_dim(grad_y, "grad_y", 3, "[B, M, C]");
  MergeBackwardParams p{};
  p.forward = merge_inputs<Backend>(x, token_map, grad_y.size(1), size, weight, mode);
  p.only_x = only_x;
  const int64_t batch = p.forward.batch, tokens = p.forward.tokens;
  check_shape(grad_y, "grad_y", {batch, p.forward.num_out, p.forward.channels}, "[B, M, C]");
  check_last_contiguous(grad_y, "grad_y");
  check_same_dtype(grad_y, "grad_y", x, "x");
  check_same_device(grad_y, "grad_y", x, "x");
  p.grad_y = grad_y.const_data_ptr();
  p.grad_y_stride_batch = grad_y.stride(0);
  p.grad_y_stride_token = grad_y.stride(1);
  p.grad_size_out = token_table(grad_size, "grad_size", x, batch, p.forward.num_out);

  Backend backend(x);
  Tensor grad_x = allocate(x, {batch, tokens, p.forward.channels}, x.scalar_type());
  Tensor grad_size_in = allocate(x, {batch, tokens}, accumulator_type(x));
  Tensor grad_weight = allocate(x, {batch, tokens}, accumulator_type(x));
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_size = grad_size_in.mutable_data_ptr();
  p.grad_weight = grad_weight.mutable_data_ptr();
  Scratch members(x, members_bytes(p.forward), Backend::kHost);
  set_members(p.forward, members.data());
  backend.merge_backward(p);
  return moved(grad_x, grad_size_in, grad_weight);
}

}  // namespace tokred
