// Front ends of ema_scan and its gradient: checks, allocation, parameters.
#pragma once

#include <limits>

#include "merge/params.h"
#include "tensor.h"

namespace tokred {

// A [B, count] of the accumulator type of c.
inline TokenTable table_beside(const Tensor& t, const char* name, const char* layout, int64_t batch,
                               int64_t count, const Tensor& c) {
  check_shape(t, name, {batch, count}, layout);
  check_dtype(t, name, accumulator_type(c));
  check_same_device(t, name, c, "c");
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

// The inputs of ema_scan, checked; the results are still to be set.
template <class Backend>
EmaScanParams ema_scan_inputs(const Tensor& c, const Tensor& p, const OptionalTensor& state,
                              const OptionalTensor& lengths) {
  EmaScanParams params{};
  params.dtype = float_dtype(c, "c", Backend::kDouble);
  check_dim(c, "c", 3, "[B, M, C]");
  check_last_contiguous(c, "c");
  params.batch = c.size(0);
  params.tokens = c.size(1);
  params.channels = c.size(2);
  TOKRED_CHECK(params.tokens < std::numeric_limits<int32_t>::max(),
               "c may have at most 2^31 - 2 tokens, got ", params.tokens);
  params.c = c.const_data_ptr();
  params.c_stride_batch = c.stride(0);
  params.c_stride_token = c.stride(1);
  params.p = table_beside(p, "p", "[B, M]", params.batch, params.tokens, c);
  if (state)
    params.state = table_beside(*state, "state", "[B, C]", params.batch, params.channels, c);
  params.lengths = batch_lengths(lengths, params.batch, c, "c", params.lengths_stride);
  return params;
}

// z [B, M, C] and the last state f32 [B, C]; see EmaScanParams.
template <class Backend>
std::tuple<Tensor, Tensor> ema_scan(const Tensor& c, const Tensor& p, const OptionalTensor& state,
                                    const OptionalTensor& lengths) {
  EmaScanParams params = ema_scan_inputs<Backend>(c, p, state, lengths);
  Backend backend(c);
  Tensor z = allocate(c, {params.batch, params.tokens, params.channels}, c.scalar_type());
  Tensor last = allocate(c, {params.batch, params.channels}, accumulator_type(c));
  params.z = z.mutable_data_ptr();
  params.state_out = last.mutable_data_ptr();
  backend.ema_scan(params);
  return moved(z, last);
}

// Gradients of c [B, M, C], p f32 [B, M] and state f32 [B, C]; see EmaScanBackwardParams.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor> ema_scan_backward(const Tensor& grad_z, const Tensor& grad_state,
                                                     const Tensor& c, const Tensor& p,
                                                     const OptionalTensor& state,
                                                     const OptionalTensor& lengths,
                                                     const Tensor& z) {
  EmaScanBackwardParams params{};
  params.forward = ema_scan_inputs<Backend>(c, p, state, lengths);
  const EmaScanParams& f = params.forward;
  const auto check_like_c = [&](const Tensor& t, const char* name) {
    check_shape(t, name, {f.batch, f.tokens, f.channels}, "[B, M, C]");
    check_last_contiguous(t, name);
    check_same_dtype(t, name, c, "c");
    check_same_device(t, name, c, "c");
  };
  check_like_c(grad_z, "grad_z");
  check_like_c(z, "z");
  params.grad_z = grad_z.const_data_ptr();
  params.grad_z_stride_batch = grad_z.stride(0);
  params.grad_z_stride_token = grad_z.stride(1);
  params.z = z.const_data_ptr();
  params.z_stride_batch = z.stride(0);
  params.z_stride_token = z.stride(1);
  params.grad_state_out = table_beside(grad_state, "grad_state", "[B, C]", f.batch, f.channels, c);

  Backend backend(c);
  Tensor grad_c = allocate(c, {f.batch, f.tokens, f.channels}, c.scalar_type());
  Tensor grad_p = allocate(c, {f.batch, f.tokens}, accumulator_type(c));
  Tensor grad_state_in = allocate(c, {f.batch, f.channels}, accumulator_type(c));
  params.grad_c = grad_c.mutable_data_ptr();
  params.grad_p = grad_p.mutable_data_ptr();
  params.grad_state = grad_state_in.mutable_data_ptr();
  const int64_t slices = (f.channels + kEmaSliceChannels - 1) / kEmaSliceChannels;
  Scratch partial(c, f.batch * slices * f.tokens * static_cast<int64_t>(grad_p.element_size()),
                  Backend::kHost);
  params.partial = partial.data();
  backend.ema_scan_backward(params);
  return moved(grad_c, grad_p, grad_state_in);
}

}  // namespace tokred
