// packed_attention: weighted sums of a block of packed values for a few query rows, from the codes
// themselves where their format allows it. Along channels the sum of p x is that of (p scale_g) c
// and that of p offset_g; along tokens it is scale (sum of p c) + offset (sum of p) over the tokens
// of a group.
#pragma once

#include "packed_attn/cpu/block.h"
#include "packed_attn/cpu/quads.h"

namespace tokred::TOKRED_ISA {

// The weighted sums of values for up to kMax rows.
template <int64_t kMax>
class PackedSums {
 public:
  const SideView& side;
  const CodePath path;
  const bool fixed;  // weights are multiplied with codes in fixed point
  const bool bytes;  // and there as ByteProducts
  const int64_t rows, dim;

  // `out` [rows][dim] is finished by finish(). With skip_zeros a token of weight 0, which may be
  // hidden, adds nothing even where its values are infinite.
  PackedSums(const SideView& values, bool in_order, int64_t count, float* out, bool skip_zeros)
      : side(values), path(read_path(values.format, in_order)),
        fixed(in_fixed_point(path, values.dtype)), bytes(multiplies_bytes()), rows(count),
        dim(values.format.head_dim), out_(out), skip_zeros_(skip_zeros) {
    fill_zero(out_, rows * dim * 4);
    if (!by_channel()) return;
    fill_zero(sums_, rows * dim * 4);
    fill_zero(offsets_, rows * static_cast<int64_t>(sizeof offsets_[0]));
  }

  // The sums so far are multiplied by shrink[row], then the tokens are added with weights[row].
  void add(const BlockAddresses& block, const float* weights, const float* shrink,
           TokenPrefetcher prefetcher) {
    for (int64_t row = 0; row < rows; ++row) {
      if (shrink[row] != 1) shrink_row(row, shrink[row]);
    }
    if (path == CodePath::unpacked || !block.packed) {
      add_unpacked(block, weights, prefetcher);
    } else if (by_channel()) {
      ReadableBlock readable;
      add_channel_groups(readable.of(side, block), weights, prefetcher);
    } else {
      add_token_groups(block, weights, prefetcher);
    }
    prefetcher.rest();
  }

  void finish() {
    if (!by_channel()) return;
    const PackFormat& f = side.format;
    alignas(64) float factor[kMaxWideDim];
    in_place_factors(path, f, factor);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t d = 0; d < dim; d += kLanes) {
        float* to = out_ + row * dim + d;
        const f32x16 sums = load(sums_ + row * dim + d);
        store(to, fixed ? load(to) + sums : fma(sums, load(factor + d), load(to)));
      }
      for (int64_t g = 0; g < groups_per_row(f); ++g) {
        const f32x16 offset = splat(sum(load(offsets_[row][g])));
        for (int64_t d = g * f.group_size; d < (g + 1) * f.group_size; d += kLanes) {
          store(out_ + row * dim + d, load(out_ + row * dim + d) + offset);
        }
      }
    }
  }

 private:
  float* const out_;
  const bool skip_zeros_;
  // Along channels: sums of codes, in f32 of codes in place; and of offsets by token % 16.
  alignas(64) float sums_[kMax * kMaxWideDim];
  alignas(64) float offsets_[kMax][kMaxUnits][kLanes];

  bool by_channel() const {
    return path != CodePath::unpacked && side.format.axis == GroupAxis::channel;
  }

  void shrink_row(int64_t row, float factor) {
    const auto shrink = [&](float* x, int64_t count) {
      for (int64_t i = 0; i < count; i += kLanes) store(x + i, load(x + i) * splat(factor));
    };
    shrink(out_ + row * dim, dim);
    if (!by_channel()) return;
    shrink(sums_ + row * dim, dim);
    shrink(offsets_[row][0], groups_per_row(side.format) * kLanes);
  }

  void add_unpacked(const BlockAddresses& block, const float* weights,
                    TokenPrefetcher& prefetcher) {
    constexpr float kOnes[kMaxRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                       1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    UnpackedRows values;
    prefetcher.spread(divide_up(block.count, kLanes));
    for (int64_t i = 0; i < block.count; i += kLanes) {
      const int64_t count = min(block.count - i, kLanes);
      prefetcher.step();
      values.load(side, block, i);
      if (!skip_zeros_) {
        add_rows<float>(weights + i, kGather, rows, values.row, count, dim, kOnes, out_, dim);
        continue;
      }
      for (int64_t row = 0; row < rows; ++row) {
        add_nonzero<float>(weights + row * kGather + i, values.row, count, dim, 1.0f,
                           out_ + row * dim);
      }
    }
  }

  void add_channel_groups(const BlockAddresses& block, const float* weights,
                          TokenPrefetcher& prefetcher) {
    const PackFormat& f = side.format;
    BlockParams params;
    params.read(f, block);
    FixedWeights quads;
    if (fixed) interleave(block, 0, block.count, quads);
    alignas(64) float scaled[kFewRows<float>][kMaxUnits][kGather];
    const int64_t groups = groups_per_row(f);
    for (int64_t row = 0; row < rows; row += kFewRows<float>) {
      const int64_t here = min(rows - row, kFewRows<float>);
      float* out = sums_ + row * dim;
      const auto scale = [&](const auto& take) {
        for (int64_t r = 0; r < here; ++r) {
          for (int64_t g = 0; g < groups; ++g) {
            take(r, g,
                 scale_weights(params, g, weights + (row + r) * kGather, block.count,
                               offsets_[row + r][g]));
          }
        }
      };
      if (fixed) {
        visit_products(bytes, [&]<class Products>() {
          scale([&](int64_t r, int64_t g, const BlockWeights& scaled_weights) {
            quads.weigh<Products>(r, g, scaled_weights, f.bits);
          });
          add_fixed<Products>(quads, here, groups, out, prefetcher);
        });
      } else {
        scale([&](int64_t r, int64_t g, const BlockWeights& scaled_weights) {
          for (int64_t i = 0; i < kGather; i += kLanes) {
            store(scaled[r][g] + i, scaled_weights.vec[i / kLanes]);
          }
        });
        add_floats(scaled[0][0], kMaxUnits * kGather, here, groups, block, 0, block.count, out,
                   prefetcher);
      }
    }
  }
  void interleave(const BlockAddresses& block, int64_t first, int64_t count,
                  FixedWeights& quads) const {
    block.visit_rows_of_codes(
        first, [&](const auto& tokens) { quads.interleave(tokens, count, side.format); });
  }
  // out_row += the weighted sums of codes in so many groups of channels.
  template <class Products>
  void add_fixed(const FixedWeights& quads, int64_t count, int64_t groups, float* out,
                 TokenPrefetcher& prefetcher) const {
    visit_fixed_path(path, [&]<CodePath kCodes>() {
      add_quads<Products, kCodes>(quads, count, dim / groups / kLanes, dim, out, prefetcher);
    });
  }
  void add_floats(const float* weights, int64_t row_weights, int64_t count, int64_t groups,
                  const BlockAddresses& block, int64_t first, int64_t token_count, float* out,
                  TokenPrefetcher& prefetcher) const {
    TokenAddress tokens[kGather];
    for (int64_t i = 0; i < token_count; ++i) tokens[i] = block[first + i];
    visit_code_path(path, [&]<CodePath kCodes>() {
      add_codes<kCodes>(weights, row_weights, count, dim / groups / kUnit, tokens, token_count,
                        dim / kUnit, out, dim, prefetcher);
    });
  }
  // Weights times the scales of a group; their sums with its offsets are added to `offsets`. A
  // token of weight 0 may be hidden: its params do not count, whatever they are.
  __attribute__((always_inline)) BlockWeights scale_weights(const BlockParams& params,
                                                            int64_t group, const float* weights,
                                                            int64_t count, float* offsets) const {
    const bool has_offsets = side.format.scheme != PackScheme::fp8;
    const f32x16 zero = splat(0.0f);
    BlockWeights scaled;
    f32x16 total = load(offsets);
#pragma GCC unroll 4
    for (int i = 0; i < kGather / kLanes; ++i) {
      const int64_t at = i * kLanes;
      scaled.vec[i] = zero;
      if (at >= count) continue;
      const f32x16 weight = load(weights + at);
      const f32x16 product = weight * load(params.scale[group] + at);
      scaled.vec[i] = select_greater(weight, zero, product, zero);
      if (!has_offsets) continue;
      const f32x16 sum = fma(weight, load(params.offset[group] + at), total);
      total = select_greater(weight, zero, sum, total);
    }
    store(offsets, total);
    return scaled;
  }

  void add_token_groups(const BlockAddresses& block, const float* weights,
                        TokenPrefetcher& prefetcher) {
    const PackFormat& f = side.format;
    GroupParams params;
    FixedWeights quads;
    alignas(64) float factor[kMaxWideDim], part[kFewRows<float> * kMaxWideDim];
    in_place_factors(path, f, factor);
    for (int64_t first = 0, end; first < block.count; first = end) {
      end = block.group_end(first);
      params.read(f, block[first].params);
      if (fixed) interleave(block, first, end - first, quads);
      for (int64_t d = 0; d < dim && !fixed; d += kLanes) {
        store(params.scale + d, load(params.scale + d) * load(factor + d));
      }
      for (int64_t row = 0; row < rows; row += kFewRows<float>) {
        const int64_t here = min(rows - row, kFewRows<float>);
        const float* weight = weights + row * kGather + first;
        fill_zero(part, here * dim * 4);
        if (fixed) {
          visit_products(bytes, [&]<class Products>() {
            for (int64_t r = 0; r < here; ++r) {
              const float* from = weight + r * kGather;
              BlockWeights plain;
#pragma GCC unroll 4
              for (int64_t i = 0; i < kGather; i += kLanes) {
                plain.vec[i / kLanes] =
                    i < end - first ? load_row(from + i, end - first - i) : splat(0.0f);
              }
              quads.weigh<Products>(r, 0, plain, f.bits);
            }
            add_fixed<Products>(quads, here, 1, part, prefetcher);
          });
        } else {
          add_floats(weight, kGather, here, 1, block, first, end - first, part, prefetcher);
        }
        for (int64_t r = 0; r < here; ++r) {
          add_group(params, part + r * dim, weight + r * kGather, end - first,
                    out_ + (row + r) * dim);
        }
      }
    }
  }
  void add_group(const GroupParams& params, const float* part, const float* weight, int64_t count,
                 float* out) const {
    float total = 0;
    for (int64_t i = 0; i < count; ++i) total += weight[i];
    if (total == 0) return;
    for (int64_t d = 0; d < dim; d += kLanes) {
      f32x16 sum = fma(load(params.scale + d), load(part + d), load(out + d));
      if (side.format.scheme != PackScheme::fp8) {
        sum = fma(splat(total), load(params.offset + d), sum);
      }
      store(out + d, sum);
    }
  }
};

}  // namespace tokred::TOKRED_ISA
