// packed_attention and packed_qk_score: logits of a few query rows with a block of packed keys,
// from the codes themselves where their format allows it. Along channels, with x = scale_g c +
// offset_g for the codes c of a token's group g, q . x = sum_g scale_g (q . c)_g + offset_g (sum of
// q over g). Along tokens scale and offset are those of a channel, for all tokens of a group: q . x
// = (q scale) . c + q . offset.
#pragma once

#include "packed_attn/cpu/block.h"
#include "packed_attn/cpu/words.h"

namespace tokred::TOKRED_ISA {

// Up to kMax rows of queries, scaled, and rotated where the keys are.
template <int64_t kMax>
class PackedQuery {
 public:
  const SideView& side;
  const CodePath path;
  const bool fixed;  // queries are multiplied with codes in fixed point
  const bool bytes;  // and there as ByteProducts
  const int64_t rows, dim;
  alignas(64) float natural[kMax * kMaxWideDim];  // [rows][dim], to be filled before start()

  PackedQuery(const SideView& keys, bool in_order, int64_t count)
      : side(keys), path(read_path(keys.format, in_order)),
        fixed(in_fixed_point(path, keys.dtype) && sums_in_32_bits(keys.format)),
        bytes(multiplies_bytes()), rows(count), dim(keys.format.head_dim) {}

  // Logits are `scale` times the dot products.
  void start(float scale) {
    const PackFormat& f = side.format;
    const bool by_channel = f.axis == GroupAxis::channel;
    alignas(64) float factor[kMaxWideDim];
    if (path != CodePath::unpacked && !fixed) word_factors(path, f, factor);
    for (int64_t row = 0; row < rows; ++row) {
      float* from = natural + row * dim;
      // Unscaled, most of it is exact.
      if (fixed && by_channel) {
        quantize_row(from, f.group_size, scale, units_ + row * dim, steps_[row], rests_[row],
                     first_totals_[row]);
      }
      for (int64_t d = 0; d < dim; d += kLanes) store(from + d, load(from + d) * splat(scale));
      if (path == CodePath::unpacked) continue;
      for (int64_t d = 0; d < dim && !fixed; d += kLanes) {
        store(placed_ + row * dim + d, load(from + d) * load(factor + d));
      }
      if (!by_channel) continue;
      for (int64_t g = 0; g < groups_per_row(f); ++g) {
        f32x16 total = splat(0.0f);
        for (int64_t d = 0; d < f.group_size; d += kLanes) {
          total = total + load(from + g * f.group_size + d);
        }
        sums_[row][g] = sum(total);
      }
    }
  }

  // logits[row][kGather] of a block's tokens; others are prefetched meanwhile.
  void dot(const BlockAddresses& block, float* logits, TokenPrefetcher prefetcher) const {
    if (path == CodePath::unpacked || !block.packed) {
      dot_unpacked(block, logits, prefetcher);
    } else if (side.format.axis == GroupAxis::channel) {
      ReadableBlock readable;
      dot_channel_groups(readable.of(side, block), logits, prefetcher);
    } else {
      dot_token_groups(block, logits, prefetcher);
    }
    prefetcher.rest();
  }

 private:
  alignas(64) float placed_[kMax * kMaxWideDim];  // natural, times word_factors(); or else
  alignas(64) int16_t units_[kMax * kMaxWideDim];  // in fixed point; see FixedQueries
  float steps_[kMax][kMaxUnits], rests_[kMax][kMaxUnits];
  int32_t first_totals_[kMax][kMaxUnits];
  float sums_[kMax][kMaxUnits];

  // A row in groups of `size`, times `scale`, for FixedQueries. `rests` are the sums of a group's
  // rounding errors times the middle code, so that errors are multiplied by codes less their mean.
  // Example: of 4 bits, with the errors 0.3 and -0.1 in a group: rest (0.3 - 0.1) * 7.5 = 1.5
  // steps.
  void quantize_row(const float* row, int64_t size, float scale, int16_t* units, float* steps,
                    float* rests, int32_t* first_totals) const {
    const int32_t bits = side.format.bits;
    const float middle = 0.5f * static_cast<float>((1 << bits) - 1);
    for (int64_t first = 0; first < dim; first += size, units += size) {
      i32x16 most = splat(0);
      for (int64_t d = 0; d < size; d += kLanes)
        most = larger_magnitude(load(row + first + d), most);
      const FixedStep step = fixed_step(most);
      f32x16 rest = splat(0.0f);
      visit_products(bytes, [&]<class Products>() {
        for (int64_t d = 0; d < size; d += kLanes) {
          const f32x16 exact = load(row + first + d) * splat(step.inverse);
          rest = rest + (exact - to_f32(round_even(exact)));
          store_units<Products>(units + d, exact);
        }
        *first_totals++ = Products::first_total(units, size, bits);
      });
      *steps++ = step.step * scale;
      *rests++ = step.step * scale * middle * sum(rest);
    }
  }

  // dot_codes() of the tokens [token, token + token_count) of a block.
  template <CodePath kCodes, class Rows>
  void dot_block(const Rows& x, int64_t count, const BlockAddresses& block, int64_t token,
                 int64_t token_count, const float* scales, int64_t groups, float* logits,
                 TokenPrefetcher& prefetcher) const {
    block.visit_rows_of_codes(token, [&](const auto& tokens) {
      dot_codes<kCodes>(x, count, tokens, token_count, scales, groups, dim / groups / kLanes,
                        logits, prefetcher);
    });
  }
  // The same of rows laid out like units_, steps_ .. and like placed_.
  template <class... Block>
  void dot_fixed(const int16_t* units, const float* steps, const float* rests,
                 const int32_t* first_totals, int64_t count, Block&&... block) const {
    visit_products(bytes, [&]<class Products>() {
      const FixedQueries<Products> x{units, dim, steps, rests, first_totals};
      visit_fixed_path(path, [&]<CodePath kCodes>() { dot_block<kCodes>(x, count, block...); });
    });
  }
  template <class... Block>
  void dot_floats(const float* numbers, int64_t count, Block&&... block) const {
    const FloatQueries x{numbers, dim};
    visit_code_path(path, [&]<CodePath kCodes>() { dot_block<kCodes>(x, count, block...); });
  }

  void dot_unpacked(const BlockAddresses& block, float* logits, TokenPrefetcher& prefetcher) const {
    UnpackedRows keys;
    prefetcher.spread(divide_up(block.count, kLanes));
    for (int64_t i = 0; i < block.count; i += kLanes) {
      prefetcher.step();
      keys.load(side, block, i);
      dot_rows<float>(natural, dim, rows, keys.row, kLanes, dim, logits + i, kGather);
    }
  }

  void dot_channel_groups(const BlockAddresses& block, float* logits,
                          TokenPrefetcher& prefetcher) const {
    const PackFormat& f = side.format;
    const int64_t groups = groups_per_row(f);
    BlockParams params;
    params.read(f, block);
    if (fixed) {
      dot_fixed(units_, steps_[0], rests_[0], first_totals_[0], rows, block, 0, block.count,
                params.scale[0], groups, logits, prefetcher);
    } else {
      dot_floats(placed_, rows, block, 0, block.count, params.scale[0], groups, logits, prefetcher);
    }
    if (f.scheme == PackScheme::fp8) return;
    for (int64_t row = 0; row < rows; ++row, logits += kGather) {
      for (int64_t i = 0; i < block.count; i += kLanes) {
        f32x16 logit = load(logits + i);
        for (int64_t g = 0; g < groups; ++g) {
          logit = fma(splat(sums_[row][g]), load(params.offset[g] + i), logit);
        }
        store(logits + i, logit);
      }
    }
  }

  void dot_token_groups(const BlockAddresses& block, float* logits,
                        TokenPrefetcher& prefetcher) const {
    const PackFormat& f = side.format;
    GroupParams params;
    alignas(64) float scaled[kFewRows<float> * kMaxWideDim];
    alignas(64) int16_t units[kFewRows<float> * kMaxWideDim];
    alignas(64) float dots[kFewRows<float> * kGather];
    float steps[kFewRows<float>][kMaxUnits], rests[kFewRows<float>][kMaxUnits];
    int32_t first_totals[kFewRows<float>][kMaxUnits];
    for (int64_t first = 0, end; first < block.count; first = end) {
      end = block.group_end(first);
      params.read(f, block[first].params);
      for (int64_t row = 0; row < rows; row += kFewRows<float>) {
        const int64_t here = min(rows - row, kFewRows<float>);
        float base[kFewRows<float>];
        for (int64_t r = 0; r < here; ++r) {
          const float *q = natural + (row + r) * dim, *x = fixed ? q : placed_ + (row + r) * dim;
          f32x16 total = splat(0.0f);
          for (int64_t d = 0; d < dim; d += kLanes) {
            store(scaled + r * dim + d, load(x + d) * load(params.scale + d));
            if (f.scheme != PackScheme::fp8) {
              total = fma(load(q + d), load(params.offset + d), total);
            }
          }
          base[r] = sum(total);
          if (fixed) {
            quantize_row(scaled + r * dim, dim, 1, units + r * dim, steps[r], rests[r],
                         first_totals[r]);
          }
        }
        if (fixed) {
          dot_fixed(units, steps[0], rests[0], first_totals[0], here, block, first, end - first,
                    nullptr, 1, dots, prefetcher);
        } else {
          dot_floats(scaled, here, block, first, end - first, nullptr, 1, dots, prefetcher);
        }
        for (int64_t r = 0; r < here; ++r) {
          float* to = logits + (row + r) * kGather + first;
          for (int64_t i = 0; i < end - first; ++i) to[i] = dots[r * kGather + i] + base[r];
        }
      }
    }
  }
};

}  // namespace tokred::TOKRED_ISA
