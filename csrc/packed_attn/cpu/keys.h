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
  const bool fixed;  // the queries meet codes in fixed point
  const int64_t rows, dim;
  alignas(64) float natural[kMax * kMaxHeadDim];  // [rows][dim], to be filled before start()

  PackedQuery(const SideView& keys, bool in_order, int64_t count)
      : side(keys), path(read_path(keys.format, in_order)), fixed(in_fixed_point(path, keys.dtype)),
        rows(count), dim(keys.format.head_dim) {}

  // Logits are `scale` times the dot products.
  void start(float scale) {
    const PackFormat& f = side.format;
    const bool by_channel = f.axis == GroupAxis::channel;
    alignas(64) float factor[kMaxHeadDim];
    if (path != CodePath::unpacked && !fixed) word_factors(path, f, factor);
    for (int64_t row = 0; row < rows; ++row) {
      float* from = natural + row * dim;
      // Unscaled, most of it is exact.
      if (fixed && by_channel) {
        quantize_query_row(from, f.group_size, scale, units_ + row * dim, steps_[row], rests_[row]);
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
      dot_channel_groups(block, logits, prefetcher);
    } else {
      dot_token_groups(block, logits, prefetcher);
    }
    prefetcher.prefetch(prefetcher.left);
  }

 private:
  alignas(64) float placed_[kMax * kMaxHeadDim];  // natural, times word_factors(); or else
  alignas(64) int16_t units_[kMax * kMaxHeadDim];  // in fixed point; see Int16Queries
  float steps_[kMax][kMaxUnits], rests_[kMax][kMaxUnits];
  float sums_[kMax][kMaxUnits];

  // A row in groups of `size`, times `scale`, for Int16Queries. `rests` are the sums of a group's
  // rounding errors times the middle code, so that errors are multiplied by codes less their mean.
  // Example: of 4 bits, with the errors 0.3 and -0.1 in a group: rest (0.3 - 0.1) * 7.5 = 1.5
  // steps.
  void quantize_query_row(const float* row, int64_t size, float scale, int16_t* units, float* steps,
                          float* rests) const {
    const float middle = 0.5f * static_cast<float>((1 << side.format.bits) - 1);
    for (int64_t first = 0; first < dim; first += size) {
      const FixedStep step = fixed_step(row + first, size);
      f32x16 rest = splat(0.0f);
      for (int64_t d = first; d < first + size; d += kLanes) {
        const f32x16 exact = load(row + d) * splat(step.inverse);
        rest = rest + (exact - to_f32(round_even(exact)));
        store_units(units + d, fixed_order(exact));
      }
      *steps++ = step.step * scale;
      *rests++ = step.step * scale * middle * sum(rest);
    }
  }

  // dot_codes() of `count` rows.
  void dot_fixed(const Int16Queries& x, int64_t count, const TokenAddress* tokens,
                 int64_t token_count, const float* scales, int64_t groups, float* logits,
                 TokenPrefetcher& prefetcher) const {
    visit_code_path(path, [&]<CodePath kCodes>() {
      visit_vnni([&]<bool kVnni>() {
        dot_codes<kCodes, Int16Queries, kVnni>(x, count, tokens, token_count, scales, groups,
                                               dim / groups / kLanes, logits, prefetcher);
      });
    });
  }
  void dot_floats(const float* numbers, int64_t count, const TokenAddress* tokens,
                  int64_t token_count, const float* scales, int64_t groups, float* logits,
                  TokenPrefetcher& prefetcher) const {
    const FloatQueries x{numbers, dim};
    visit_code_path(path, [&]<CodePath kCodes>() {
      dot_codes<kCodes>(x, count, tokens, token_count, scales, groups, dim / groups / kLanes,
                        logits, prefetcher);
    });
  }

  void dot_unpacked(const BlockAddresses& block, float* logits, TokenPrefetcher& prefetcher) const {
    UnpackedRows keys;
    for (int64_t i = 0; i < block.count; i += kLanes) {
      prefetcher.prefetch(kLanes);
      keys.load(side, block.at + i, block.count - i);
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
      dot_fixed({units_, dim, steps_[0], rests_[0]}, rows, block.at, block.count, params.scale[0],
                groups, logits, prefetcher);
    } else {
      dot_floats(placed_, rows, block.at, block.count, params.scale[0], groups, logits, prefetcher);
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
    alignas(64) float scaled[kFewRows<float> * kMaxHeadDim];
    alignas(64) int16_t units[kFewRows<float> * kMaxHeadDim];
    float steps[kFewRows<float>][kMaxUnits], rests[kFewRows<float>][kMaxUnits];
    for (int64_t first = 0, end; first < block.count; first = end) {
      end = block.group_end(first);
      params.read(f, block.at[first].params);
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
          if (fixed)
            quantize_query_row(scaled + r * dim, dim, 1, units + r * dim, steps[r], rests[r]);
        }
        float* to = logits + row * kGather + first;
        const TokenAddress* at = block.at + first;
        if (fixed) {
          dot_fixed({units, dim, steps[0], rests[0]}, here, at, end - first, nullptr, 1, to,
                    prefetcher);
        } else {
          dot_floats(scaled, here, at, end - first, nullptr, 1, to, prefetcher);
        }
        for (int64_t r = 0; r < here; ++r, to += kGather) {
          for (int64_t i = 0; i < end - first; ++i) to[i] += base[r];
        }
      }
    }
  }
};

}  // namespace tokred::TOKRED_ISA
