// The logits that a block of packed tokens gives a few query rows, from the codes themselves where
// their format allows it. Along channels, with x = scale_g c + offset_g for the codes c of a
// token's group g, q . x = sum_g scale_g (q . c)_g + offset_g (sum of q over g). Along tokens scale
// and offset are those of a channel, for all tokens of a group: q . x = (q scale) . c + q . offset.
#pragma once

#include "packed_attn_block.h"
#include "packed_attn_words.h"

namespace tokred::TOKRED_ISA {

// Up to kMost rows of queries, scaled, and rotated where the keys are.
template <int64_t kMost>
class PackedQuery {
 public:
  const SideView& side;
  const Codes codes;
  const int64_t rows, dim;
  alignas(64) float natural[kMost * kMaxHeadDim];  // [rows][dim], to be filled before start()

  PackedQuery(const SideView& keys, bool in_order, int64_t count)
      : side(keys), codes(codes_read(keys.format, in_order)), rows(count),
        dim(keys.format.head_dim) {}

  void start() {
    const PackFormat& f = side.format;
    if (codes == Codes::none) return;
    alignas(64) float factor[kMaxHeadDim];
    word_factors(codes, f, factor);
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = natural + row * dim;
      for (int64_t d = 0; d < dim; d += kLanes) {
        store(placed_ + row * dim + d, load(from + d) * load(factor + d));
      }
      if (f.axis == GroupAxis::token) continue;
      for (int64_t g = 0; g < groups_per_row(f); ++g) {
        f32x16 total = splat(0.0f);
        for (int64_t d = 0; d < f.group_size; d += kLanes) {
          total = total + load(from + g * f.group_size + d);
        }
        sums_[row][g] = sum(total);
      }
    }
  }

  // logits[row][kGather] of a block's tokens; others are brought closer meanwhile.
  void dot(const BlockPlaces& block, float* logits, PlacesAhead ahead) const {
    if (codes == Codes::none || !block.packed) {
      dot_unpacked(block, logits, ahead);
    } else if (side.format.axis == GroupAxis::channel) {
      dot_channel_groups(block, logits, ahead);
    } else {
      dot_token_groups(block, logits, ahead);
    }
    ahead.take(ahead.left);
  }

 private:
  alignas(64) float placed_[kMost * kMaxHeadDim];  // natural, times word_factors()
  float sums_[kMost][kMostUnits];

  void dot_unpacked(const BlockPlaces& block, float* logits, PlacesAhead& ahead) const {
    UnpackedRows keys;
    for (int64_t i = 0; i < block.count; i += kLanes) {
      ahead.take(kLanes);
      keys.load(side, block.at + i, block.count - i);
      dot_rows<float>(natural, dim, rows, keys.row, kLanes, dim, logits + i, kGather);
    }
  }

  void dot_channel_groups(const BlockPlaces& block, float* logits, PlacesAhead& ahead) const {
    const PackFormat& f = side.format;
    const int64_t groups = groups_per_row(f);
    BlockParams params;
    params.take(f, block);
    visit_codes(codes, [&]<Codes kCodes>() {
      dot_codes<kCodes>(placed_, dim, rows, block.at, block.count, params.scale[0], groups,
                        f.group_size / kLanes, logits, ahead);
    });
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

  void dot_token_groups(const BlockPlaces& block, float* logits, PlacesAhead& ahead) const {
    const PackFormat& f = side.format;
    GroupParams params;
    alignas(64) float scaled[kFewRows<float> * kMaxHeadDim];
    for (int64_t first = 0, end; first < block.count; first = end) {
      end = block.group_end(first);
      params.take(f, block.at[first].params);
      for (int64_t row = 0; row < rows; row += kFewRows<float>) {
        const int64_t here = smaller(rows - row, kFewRows<float>);
        float base[kFewRows<float>];
        for (int64_t r = 0; r < here; ++r) {
          const float* q = natural + (row + r) * dim;
          f32x16 total = splat(0.0f);
          for (int64_t d = 0; d < dim; d += kLanes) {
            store(scaled + r * dim + d,
                  load(placed_ + (row + r) * dim + d) * load(params.scale + d));
            if (f.scheme != PackScheme::fp8) {
              total = fma(load(q + d), load(params.offset + d), total);
            }
          }
          base[r] = sum(total);
        }
        float* to = logits + row * kGather + first;
        visit_codes(codes, [&]<Codes kCodes>() {
          dot_codes<kCodes>(scaled, dim, here, block.at + first, end - first, nullptr, 1,
                            dim / kLanes, to, ahead);
        });
        for (int64_t r = 0; r < here; ++r, to += kGather) {
          for (int64_t i = 0; i < end - first; ++i) to[i] += base[r];
        }
      }
    }
  }
};

}  // namespace tokred::TOKRED_ISA
