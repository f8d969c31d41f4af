// Products of a row-major block with panels [step][16 lanes], accumulated in registers.
#pragma once

#include "common/cpu/simd.h"

namespace tokred::TOKRED_ISA {

// x where v is equal to `to`, y elsewhere.
template <class T>
TOKRED_INLINE Vec<T> select_equal(Vec<T> v, T to, Vec<T> x, Vec<T> y) {
  const Vec<T> other = splat(to);
  return map<Vec<T>>([&](int i) { return v.r[i] == other.r[i] ? x.r[i] : y.r[i]; });
}

// Whether some number is NaN; `count` is a multiple of kLanes.
template <class T>
TOKRED_INLINE bool any_nan(const T* numbers, int64_t count) {
  Vec<T> nan = splat(T{0});
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec<T> some = load(numbers + i);
    nan = select_number(some, nan, some);
  }
  return sum(nan) != 0;
}

// How the streamed operand lies: block[row][step], or block[step][row].
enum class Layout { row_step, step_row };

// As many sums as leave registers for the operands.
template <class Acc>
inline constexpr int kTilePanels = kRegisterBytes == 64 && sizeof(Acc) == 4 ? 2 : 1;
template <class Acc>
inline constexpr int kTileRows =
    (kRegisterBytes == 64 ? 24 : 12) / Vec<Acc>::kRegisters / kTilePanels<Acc>;

// emit(row, panel, sum over the steps, ascending, of block(row, step) * panels[panel][step]). Whole
// tiles call it from registers; the others, at the ends of blocks, in a loop, which is less code.
template <int kRows, int kPanels, Layout kLayout, class Acc, class Emit>
TOKRED_INLINE void tile(const Acc* block, int64_t stride, const Acc* panels, int64_t panel_stride,
                        int64_t steps, const Emit& emit) {
  Vec<Acc> sum[kRows][kPanels];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int panel = 0; panel < kPanels; ++panel) sum[row][panel] = splat(Acc{0});
  }
  for (int64_t step = 0; step < steps; ++step) {
    Vec<Acc> lanes[kPanels];
#pragma GCC unroll 4
    for (int panel = 0; panel < kPanels; ++panel) {
      lanes[panel] = load(panels + panel * panel_stride + step * kLanes);
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Vec<Acc> x = splat(kLayout == Layout::row_step ? block[row * stride + step]
                                                           : block[step * stride + row]);
#pragma GCC unroll 4
      for (int panel = 0; panel < kPanels; ++panel) {
        sum[row][panel] = fma(x, lanes[panel], sum[row][panel]);
      }
    }
  }
  if constexpr (kRows == kTileRows<Acc> && kPanels == kTilePanels<Acc>) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int panel = 0; panel < kPanels; ++panel) emit(row, panel, sum[row][panel]);
    }
  } else {
    alignas(kRegisterBytes) Acc stored[kRows][kPanels][kLanes];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int panel = 0; panel < kPanels; ++panel) store(stored[row][panel], sum[row][panel]);
    }
#pragma GCC unroll 1
    for (int i = 0; i < kRows * kPanels; ++i) {
      emit(i / kPanels, i % kPanels, load(stored[i / kPanels][i % kPanels]));
    }
  }
}

template <int kRows, int kPanels, Layout kLayout, class Acc, class Emit>
TOKRED_INLINE void row_tiles(const Acc* block, int64_t stride, int64_t row, int64_t rows,
                             const Acc* panels, int64_t panel_stride, int64_t steps,
                             const Emit& emit) {
  for (; row + kRows <= rows; row += kRows) {
    const Acc* first = block + (kLayout == Layout::row_step ? row * stride : row);
    tile<kRows, kPanels, kLayout>(
        first, stride, panels, panel_stride, steps,
        [&](int r, int panel, Vec<Acc> sum) { emit(row + r, panel, sum); });
  }
  if constexpr (kRows > 1) {
    constexpr int kNext = kRows > 8 ? 8 : kRows > 4 ? 4 : kRows > 2 ? 2 : 1;
    row_tiles<kNext, kPanels, kLayout>(block, stride, row, rows, panels, panel_stride, steps, emit);
  }
}

// The same for all `rows` rows of a block and `count` (<= kTilePanels) panels. A function of its
// own, so that its loops have the registers to themselves.
template <Layout kLayout, class Acc, class Emit>
__attribute__((noinline)) static void multiply(const Acc* block, int64_t stride, int64_t rows,
                                               const Acc* panels, int64_t panel_stride,
                                               int64_t count, int64_t steps, const Emit& emit) {
  if (count == kTilePanels<Acc>) {
    row_tiles<kTileRows<Acc>, kTilePanels<Acc>, kLayout>(block, stride, 0, rows, panels,
                                                         panel_stride, steps, emit);
  } else {
    row_tiles<kTileRows<Acc>, 1, kLayout>(block, stride, 0, rows, panels, panel_stride, steps,
                                          emit);
  }
}

// The same, but panels' numbers of exactly 0 are skipped, so that 0 times an infinity or NaN of the
// block adds nothing. Equal bits for finite blocks.
template <Layout kLayout, class Acc, class Emit>
__attribute__((noinline)) static void multiply_nonzero(const Acc* block, int64_t stride,
                                                       int64_t rows, const Acc* panels,
                                                       int64_t panel_stride, int64_t count,
                                                       int64_t steps, const Emit& emit) {
  for (int64_t panel = 0; panel < count; ++panel) {
    for (int64_t row = 0; row < rows; ++row) {
      Vec<Acc> sum = splat(Acc{0});
      for (int64_t step = 0; step < steps; ++step) {
        const Acc x =
            block[kLayout == Layout::row_step ? row * stride + step : step * stride + row];
        const Vec<Acc> lanes = load(panels + panel * panel_stride + step * kLanes);
        const Vec<Acc> next = fma(splat(x), lanes, sum);
        sum = x - x == 0 ? next : select_equal(lanes, Acc{0}, sum, next);
      }
      emit(row, panel, sum);
    }
  }
}

}  // namespace tokred::TOKRED_ISA
