// ema_scan and its gradient: a walk along the tokens, kSlice channels at a time, whose state stays
// in the L1 cache. Tasks are slices of items; the gradient of p is summed over the slices last.
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "merge/params.h"

namespace tokred::TOKRED_ISA {
namespace {

constexpr int64_t kSlice = 512;
static_assert(kSlice % kLanes == 0 && kSlice >= kEmaSliceChannels);

int64_t slices_of(const EmaScanParams& p) { return (p.channels + kSlice - 1) / kSlice; }

int64_t length_of(const EmaScanParams& p, int64_t item) {
  if (!p.lengths) return p.tokens;
  const int64_t length = p.lengths[item * p.lengths_stride];
  return length < 0 ? 0 : length < p.tokens ? length : p.tokens;
}

template <class A>
A entry(const TokenTable& table, int64_t row, int64_t column) {
  return static_cast<const A*>(table.data)[row * table.stride_batch + column * table.stride_token];
}

// One slice of one item: channels first .. first + width - 1.
template <class T>
struct Slice {
  using A = Accumulator<T>;
  const EmaScanParams& p;
  int64_t item, number, first, width, length;
  alignas(64) A state[kSlice] = {};

  Slice(const EmaScanParams& params, int64_t task)
      : p(params), item(task / slices_of(p)), number(task % slices_of(p)), first(number * kSlice),
        width(p.channels - first < kSlice ? p.channels - first : kSlice),
        length(length_of(p, item)) {}

  void read_state(const TokenTable& table) {
    if (!table.data) return;
    for (int64_t c = 0; c < width; ++c) state[c] = entry<A>(table, item, first + c);
  }
  void write_state(void* to) const {
    A* row = static_cast<A*>(to) + item * p.channels + first;
    for (int64_t c = 0; c < width; ++c) row[c] = state[c];
  }
  // Row `token` of a [B, M, C] tensor from this slice on.
  template <class P>
  auto row(P* data, int64_t stride_batch, int64_t stride_token, int64_t token) const {
    using Row = std::conditional_t<std::is_const_v<P>, const T, T>;
    return static_cast<Row*>(data) + item * stride_batch + token * stride_token + first;
  }
  template <class P>
  auto row(P* data, int64_t token) const {
    return row(data, p.tokens * p.channels, p.channels, token);
  }
};

template <class T>
void scan_slice(Slice<T>& s) {
  using A = Accumulator<T>;
  const EmaScanParams& p = s.p;
  s.read_state(p.state);
  for (int64_t i = 0; i < s.length; ++i) {
    const T* input = s.row(p.c, p.c_stride_batch, p.c_stride_token, i);
    T* z = s.row(p.z, i);
    const A share = entry<A>(p.p, s.item, i);
    const auto take = splat(share), keep = splat(A(1) - share);
    for (int64_t c = 0; c < s.width; c += kLanes) {
      const auto next = fma(keep, load(s.state + c), take * load_row(input + c, s.width - c));
      store(s.state + c, next);
      store_row(z + c, next, s.width - c);
    }
  }
  for (int64_t i = s.length; i < p.tokens; ++i) {
    fill_zero(s.row(p.z, i), s.width * static_cast<int64_t>(sizeof(T)));
  }
  s.write_state(p.state_out);
}

// s.state is the gradient that reaches z from the tokens behind.
template <class T>
void scan_slice_backward(const EmaScanBackwardParams& p, Slice<T>& s) {
  using A = Accumulator<T>;
  const EmaScanParams& f = p.forward;
  A* partial = static_cast<A*>(p.partial) + (s.item * slices_of(f) + s.number) * f.tokens;
  for (int64_t i = s.length; i < f.tokens; ++i) {
    fill_zero(s.row(p.grad_c, i), s.width * static_cast<int64_t>(sizeof(T)));
    partial[i] = A(0);
  }
  alignas(64) A before[kSlice] = {};
  s.read_state(p.grad_state_out);
  for (int64_t i = s.length - 1; i >= 0; --i) {
    const T* input = s.row(f.c, f.c_stride_batch, f.c_stride_token, i);
    const T* grad_z = s.row(p.grad_z, p.grad_z_stride_batch, p.grad_z_stride_token, i);
    T* grad_c = s.row(p.grad_c, i);
    if (i > 0) {
      pack_row(s.row(p.z, p.z_stride_batch, p.z_stride_token, i - 1), s.width, before);
    } else {
      for (int64_t c = 0; c < s.width; ++c) {
        before[c] = f.state.data ? entry<A>(f.state, s.item, s.first + c) : A(0);
      }
    }
    const A share = entry<A>(f.p, s.item, i);
    const auto take = splat(share), keep = splat(A(1) - share);
    auto total = splat(A(0));
    for (int64_t c = 0; c < s.width; c += kLanes) {
      const auto grad = load(s.state + c) + load_row(grad_z + c, s.width - c);
      total = fma(grad, load_row(input + c, s.width - c) - load(before + c), total);
      store_row(grad_c + c, take * grad, s.width - c);
      store(s.state + c, keep * grad);
    }
    partial[i] = sum(total);
  }
  s.write_state(p.grad_state);
}

}  // namespace

void ema_scan(const EmaScanParams& p, const Parallel& parallel) {
  visit_dtype(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, p.batch * slices_of(p), [&](int64_t task, int64_t) {
      Slice<T> slice(p, task);
      scan_slice(slice);
    });
  });
}

void ema_scan_backward(const EmaScanBackwardParams& p, const Parallel& parallel) {
  const EmaScanParams& f = p.forward;
  visit_dtype(f.dtype, [&]<class T>() {
    using A = Accumulator<T>;
    const int64_t slices = slices_of(f);
    parallel_tasks(parallel, f.batch * slices, [&](int64_t task, int64_t) {
      Slice<T> slice(f, task);
      scan_slice_backward(p, slice);
    });
    parallel_tasks(parallel, f.batch, [&](int64_t item, int64_t) {
      const A* partial = static_cast<const A*>(p.partial) + item * slices * f.tokens;
      A* grad_p = static_cast<A*>(p.grad_p) + item * f.tokens;
      for (int64_t i = 0; i < f.tokens; ++i) {
        grad_p[i] = A(0);
        for (int64_t s = 0; s < slices; ++s) grad_p[i] += partial[s * f.tokens + i];
      }
    });
  });
}

}  // namespace tokred::TOKRED_ISA
