// transition_stats on the CPU: norms and dot product of two rows in one pass, bound by memory.
#include "common/cpu/parallel.h"
#include "common/cpu/row.h"
#include "common/cpu/sizes.h"
#include "score/params.h"

namespace tokred::TOKRED_ISA {
namespace {

template <class T>
void compare_rows(const TransitionParams& p, int64_t item, int64_t token) {
  const T* before = static_cast<const T*>(p.before) + item * p.before_stride_batch +
                    token * p.before_stride_token;
  const T* after =
      static_cast<const T*>(p.after) + item * p.after_stride_batch + token * p.after_stride_token;
  f32x16 product = splat(0.0f), square_before = product, square_after = product;
  for (int64_t c = 0; c < p.channels; c += kLanes) {
    const f32x16 x = load_row(before + c, p.channels - c);
    const f32x16 y = load_row(after + c, p.channels - c);
    product = fma(x, y, product);
    square_before = fma(x, x, square_before);
    square_after = fma(y, y, square_after);
  }
  const auto clamped = [](float norm) { return norm < kNormEps ? kNormEps : norm; };
  const float length = __builtin_sqrtf(sum(square_after));
  const float divisor = clamped(__builtin_sqrtf(sum(square_before)));
  p.ratio[item * p.tokens + token] = length / divisor;
  p.cosine[item * p.tokens + token] = sum(product) / divisor / clamped(length);
}

}  // namespace

void transition_stats(const TransitionParams& p, const Parallel& parallel) {
  constexpr int64_t kTokens = 64;
  const int64_t blocks = divide_up(p.tokens, kTokens);
  visit_f32(p.dtype, [&]<class T>() {
    parallel_tasks(parallel, p.batch * blocks, [&](int64_t task, int64_t) {
      const int64_t first = task % blocks * kTokens;
      const int64_t end = first + kTokens < p.tokens ? first + kTokens : p.tokens;
      for (int64_t t = first; t < end; ++t) compare_rows<T>(p, task / blocks, t);
    });
  });
}

}  // namespace tokred::TOKRED_ISA
