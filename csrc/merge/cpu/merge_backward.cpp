// merge_backward: gradients of merge. Owner computes: a token belongs to one slot, so the task of
// the slot writes all its gradients.
#include "common/cpu/copy.h"
#include "merge/cpu/slots.h"

namespace tokred::TOKRED_ISA {
namespace {

// The gradients of one slot's members.
template <class T>
struct Gradients {
  using A = Accumulator<T>;
  const MergeBackwardParams& p;
  int64_t item;
  const T* grad_y;  // [C]
  A grad_size_out;

  Gradients(const MergeBackwardParams& params, int64_t item, int64_t slot) : p(params), item(item) {
    grad_y = static_cast<const T*>(p.grad_y) + item * p.grad_y_stride_batch +
             slot * p.grad_y_stride_token;
    const TokenTable& table = p.grad_size_out;
    grad_size_out =
        static_cast<const A*>(table.data)[item * table.stride_batch + slot * table.stride_token];
  }
  T* x(int64_t token) const {
    return static_cast<T*>(p.grad_x) + (item * p.forward.tokens + token) * p.forward.channels;
  }
  A& size(int64_t token) const {
    return static_cast<A*>(p.grad_size)[item * p.forward.tokens + token];
  }
  A& weight(int64_t token) const {
    return static_cast<A*>(p.grad_weight)[item * p.forward.tokens + token];
  }
};

template <class T>
void scale_into(T* to, const T* from, Accumulator<T> factor, int64_t channels) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    store_row(to + c, load_row(from + c, channels - c) * splat(factor), channels - c);
  }
}

// sum, mean and plain_mean: y = sum of coefficient * x over `total`.
template <class T>
void linear_backward(const Slot<T>& slot, const Gradients<T>& grad, int64_t channels) {
  using A = Accumulator<T>;
  const MergeMode mode = slot.p.mode;
  const bool use_size = mode == MergeMode::mean, divided = mode != MergeMode::sum;
  const A total = divided ? slot.total(use_size) : A(1);
  const A inverse = total == A(0) ? A(0) : A(1) / total;
  A mean_dot = A(0);  // grad_y . y
  for (int64_t m = 0; m < slot.count; ++m) {
    const int64_t token = slot.members[m];
    const A coefficient = slot.coefficient(token, use_size);
    scale_into(grad.x(token), grad.grad_y, coefficient * inverse, channels);
    if (grad.p.only_x) continue;
    const A dot = dot_row(grad.grad_y, slot.x(token), channels);
    grad.weight(token) = dot;
    mean_dot += coefficient * inverse * dot;
  }
  if (grad.p.only_x) return;
  for (int64_t m = 0; m < slot.count; ++m) {
    const int64_t token = slot.members[m];
    const A dot = grad.weight(token) - (divided ? mean_dot : A(0));
    if (use_size) grad.size(token) += slot.weight(token) * inverse * dot;
    grad.weight(token) = (use_size ? slot.size(token) : A(1)) * inverse * dot;
  }
}

// amax and amin: tied members share the gradient evenly.
template <class T, bool kMax>
void extreme_backward(const Slot<T>& slot, const Gradients<T>& grad, int64_t channels) {
  using A = Accumulator<T>;
  for (int64_t c = 0; c < channels; ++c) {
    A best = to_float(slot.x(slot.members[0])[c]), ties = A(0);
    for (int64_t m = 0; m < slot.count; ++m) {
      const A v = to_float(slot.x(slot.members[m])[c]);
      if (kMax ? v > best : v < best) best = v, ties = A(0);
      if (v == best) ties += A(1);
      if (v != v) best = v;
    }
    for (int64_t m = 0; m < slot.count; ++m) {
      const bool wins = to_float(slot.x(slot.members[m])[c]) == best;
      from_float(wins ? to_float(grad.grad_y[c]) / ties : A(0), grad.x(slot.members[m])[c]);
    }
  }
}

template <class T>
void prune_backward(const Slot<T>& slot, const Gradients<T>& grad, int64_t channels) {
  const int64_t keeper = slot.heaviest();
  copy_bytes(grad.x(keeper), grad.grad_y, channels * static_cast<int64_t>(sizeof(T)));
}

// halving: the last member of all but the keeper has weight 1/2, the one before it 1/4, and the
// keeper what the first of them has.
template <class T>
void halving_backward(const Slot<T>& slot, const Gradients<T>& grad, int64_t channels) {
  using A = Accumulator<T>;
  const int64_t keeper = slot.heaviest();
  A share = A(1);
  for (int64_t m = slot.count - 1; m >= 0; --m) {
    const int64_t token = slot.members[m];
    if (token == keeper) continue;
    share *= A(0.5);
    scale_into(grad.x(token), grad.grad_y, share, channels);
  }
  scale_into(grad.x(keeper), grad.grad_y, share, channels);
}

template <class T>
TOKRED_INLINE Vec<Accumulator<T>> sum_of_members(const Slot<T>& slot, int64_t c, int64_t channels) {
  auto total = splat(Accumulator<T>(0));
  for (int64_t m = 0; m < slot.count; ++m) {
    const int64_t token = slot.members[m];
    total =
        fma(splat(slot.coefficient(token, true)), load_row(slot.x(token) + c, channels - c), total);
  }
  return total;
}

// maxnorm: y = s / |s| * R with s the weighted sum and R the norm of the longest member, so
// grad_s = R / |s| (g - s (g . s) / |s|^2), and the longest member also receives (g . s) / |s| of
// its own direction.
template <class T>
void maxnorm_backward(const Slot<T>& slot, const Gradients<T>& grad, int64_t channels) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  V squared = splat(A(0)), aligned = splat(A(0));
  for (int64_t c = 0; c < channels; c += kLanes) {
    const V s = sum_of_members(slot, c, channels);
    squared = fma(s, s, squared);
    aligned = fma(s, load_row(grad.grad_y + c, channels - c), aligned);
  }
  const A norm_squared = sum(squared), along = sum(aligned);
  if (norm_squared == A(0)) return;
  A longest_squared;
  const int64_t longest = slot.longest(channels, longest_squared);
  const A norm = square_root(norm_squared), radius = square_root(longest_squared);
  const V gain = splat(radius / norm), back = splat(along / norm_squared);
  const V own = splat(along / (norm * radius));
  for (int64_t m = 0; m < slot.count; ++m) grad.weight(slot.members[m]) = A(0);  // until the end
  for (int64_t c = 0; c < channels; c += kLanes) {
    const V s = sum_of_members(slot, c, channels);
    const V grad_s = gain * (load_row(grad.grad_y + c, channels - c) - s * back);
    for (int64_t m = 0; m < slot.count; ++m) {
      const int64_t token = slot.members[m];
      const V x = load_row(slot.x(token) + c, channels - c);
      V g = splat(slot.coefficient(token, true)) * grad_s;
      if (token == longest) g = fma(own, x, g);
      store_row(grad.x(token) + c, g, channels - c);
      grad.weight(token) += sum(grad_s * x);
    }
  }
  for (int64_t m = 0; m < slot.count; ++m) {
    const int64_t token = slot.members[m];
    const A dot = grad.p.only_x ? A(0) : grad.weight(token);
    grad.size(token) += slot.weight(token) * dot;
    grad.weight(token) = slot.size(token) * dot;
  }
}

template <class T>
void slot_backward(const Slot<T>& slot, const Gradients<T>& grad, int64_t channels) {
  if (slot.count == 0) return;
  switch (slot.p.mode) {
    case MergeMode::sum:
    case MergeMode::mean:
    case MergeMode::plain_mean: return linear_backward(slot, grad, channels);
    case MergeMode::amax: return extreme_backward<T, true>(slot, grad, channels);
    case MergeMode::amin: return extreme_backward<T, false>(slot, grad, channels);
    case MergeMode::prune: return prune_backward(slot, grad, channels);
    case MergeMode::halving: return halving_backward(slot, grad, channels);
    case MergeMode::maxnorm: return maxnorm_backward(slot, grad, channels);
  }
}

template <class T>
void merge_backward_all(const MergeBackwardParams& p, const Parallel& parallel) {
  using A = Accumulator<T>;
  const MergeParams& f = p.forward;
  list_members(f, parallel);
  // Prune leaves out all members but one, maxnorm those of a slot whose sum is 0.
  const bool writes_members = f.mode != MergeMode::prune && f.mode != MergeMode::maxnorm;
  parallel_tasks(parallel, f.batch, [&](int64_t item, int64_t) {
    constexpr int64_t kBytes = sizeof(T), kWideBytes = sizeof(A);
    T* grad_x = static_cast<T*>(p.grad_x) + item * f.tokens * f.channels;
    for (int64_t token = 0; token < f.tokens; ++token) {
      if (writes_members && slot_of(f, item, token) >= 0) continue;
      fill_zero(grad_x + token * f.channels, f.channels * kBytes);
    }
    fill_zero(static_cast<A*>(p.grad_size) + item * f.tokens, f.tokens * kWideBytes);
    fill_zero(static_cast<A*>(p.grad_weight) + item * f.tokens, f.tokens * kWideBytes);
  });
  constexpr int64_t kSlots = 32;
  const int64_t chunks = (f.num_out + kSlots - 1) / kSlots;
  parallel_tasks(parallel, f.batch * chunks, [&](int64_t task, int64_t) {
    const int64_t item = task / chunks, first = task % chunks * kSlots;
    const int64_t last = first + kSlots < f.num_out ? first + kSlots : f.num_out;
    for (int64_t o = first; o < last; ++o) {
      const Slot<T> slot(f, item, o);
      const Gradients<T> grad(p, item, o);
      for (int64_t m = 0; m < slot.count; ++m) {
        grad.size(slot.members[m]) = p.only_x ? A(0) : grad.grad_size_out;
      }
      slot_backward(slot, grad, f.channels);
    }
  });
}

}  // namespace

void merge_backward(const MergeBackwardParams& p, const Parallel& parallel) {
  visit_dtype(p.forward.dtype, [&]<class T>() { merge_backward_all<T>(p, parallel); });
}

}  // namespace tokred::TOKRED_ISA
