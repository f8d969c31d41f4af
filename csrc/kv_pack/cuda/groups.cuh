// Groups of numbers that share a scale: finding it, using it, and where it is stored.
#pragma once

#include "common/cuda/chunk.cuh"
#include "common/cuda/warp.cuh"
#include "kv_pack/cuda/codes.cuh"

namespace tokred::cuda::packing {

__device__ __forceinline__ float param(uint16_t bits) { return to_float(f16{bits}); }

// Packing ----------------------------------------------------------------------------------------

// The minimum and the maximum of the finite numbers.
struct Extremes {
  float low = kInfinity, high = -kInfinity;

  __device__ __forceinline__ void join(const Extremes& other) {
    low = fminf(low, other.low);
    high = fmaxf(high, other.high);
  }
  __device__ __forceinline__ void add(float x) {
    if ((__float_as_uint(x) & 0x7fffffffu) < 0x7f800000u) join({x, x});
  }
  __device__ __forceinline__ void join_lane(int lane) {
    join({__shfl_sync(kAllLanes, low, lane), __shfl_sync(kAllLanes, high, lane)});
  }
  // Over the `lanes` lanes from `first` on, of which this is one.
  __device__ __forceinline__ void reduce(int lanes, int first) {
    if ((lanes & (lanes - 1)) == 0) {
      for (int step = 1; step < lanes; step *= 2) join_lane(lane_id() ^ step);
      return;
    }
    const Extremes mine = *this;
    for (int i = 0; i < lanes; ++i) {
      const int lane = (first + i) % kWarp;
      join({__shfl_sync(kAllLanes, mine.low, lane), __shfl_sync(kAllLanes, mine.high, lane)});
    }
  }
};

// The sum of the squares of a group's finite numbers, in the order of PackScheme. Its `lanes`
// lanes, from `first` on, have eight channels each.
__device__ __forceinline__ float sum_squares(const float (&x)[8], int lanes, int first) {
  float square[8], total[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float size = fabsf(x[i]), number = size < kInfinity ? fminf(size, kMaxInMean) : 0.0f;
    square[i] = __fmul_rn(number, number);
    total[i] = 0.0f;
  }
#pragma unroll 1
  for (int lane = first + lane_id() % 2; lane < first + lanes; lane += 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      total[i] = __fadd_rn(total[i], __shfl_sync(kAllLanes, square[i], lane % kWarp));
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    total[i] = __fadd_rn(total[i], __shfl_xor_sync(kAllLanes, total[i], 1));
  }
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) total[i] = __fadd_rn(total[i], total[i + half]);
  }
  return total[0];
}

// x / y, correctly rounded wherever the quotient matters to a code: with 1 / y at hand that takes a
// product and its correction, twice. Of ordinary y only, else it divides.
class Divider {
 public:
  __device__ __forceinline__ explicit Divider(float y) : divisor_(y), inverse_(0.0f) {
    if (y >= 0x1p-60f && y <= 0x1p60f) inverse_ = __fdiv_rn(1.0f, y);
  }
  __device__ __forceinline__ float divide(float x) const {
    if (inverse_ == 0.0f || fabsf(x) > 0x1p100f) return __fdiv_rn(x, divisor_);
    float quotient = __fmul_rn(x, inverse_);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      quotient = fmaf(fmaf(-quotient, divisor_, x), inverse_, quotient);
    }
    return copysignf(quotient, x);  // of a positive divisor, as corrections make 0 of -0
  }

 private:
  float divisor_, inverse_;
};

// A scale or an offset as it is stored.
__device__ __forceinline__ uint16_t storable(float x) {
  return from_float<f16>(fminf(fmaxf(x, -kMaxParam), kMaxParam)).bits;
}

// How the numbers of a group become codes.
class Quantizer {
 public:
  __device__ __forceinline__ Quantizer(const PackFormat& f, Extremes range)
      : scheme_(f.scheme), levels_(static_cast<float>((1 << f.bits) - 1)),
        half_(static_cast<float>(1 << (f.bits - 1))), scale_(scale(f, range, levels_, half_)),
        second_(0.0f), divider_(scale_) {
    if (scheme_ == PackScheme::asymmetric) second_ = range.low;
    if (scheme_ == PackScheme::zero_point) second_ = rintf(ratio(0.0f - range.low));
  }

  __device__ __forceinline__ uint32_t code(float x) const {
    switch (scheme_) {
      case PackScheme::asymmetric: return whole(rintf(clamp(ratio(x - second_), 0.0f, levels_)));
      case PackScheme::zero_point: return whole(clamp(rintf(ratio(x)) + second_, 0.0f, levels_));
      case PackScheme::symmetric:
        return whole(clamp(rintf(ratio(x)), -half_, half_ - 1.0f) + half_);
      default: return to_e4m3(clamp(ratio(x), -kFp8Max, kFp8Max));
    }
  }

  // Stores scale and offset as those of group `group` of `groups`.
  __device__ __forceinline__ void store(uint16_t* row, int group, int groups) const {
    row[group] = storable(scale_);
    if (has_offset(scheme_)) row[groups + group] = storable(second_);
  }

 private:
  static __device__ __forceinline__ float clamp(float x, float low, float high) {
    return fminf(fmaxf(x, low), high);
  }
  static __device__ __forceinline__ uint32_t whole(float x) { return static_cast<uint32_t>(x); }
  // Sets both extremes to 0 where there is no finite number.
  static __device__ __forceinline__ float scale(const PackFormat& f, Extremes& range, float levels,
                                                float half) {
    if (range.low > range.high) range = {0.0f, 0.0f};
    range = {range.low + 0.0f, range.high + 0.0f};  // -0 becomes 0: min does not tell them apart
    if (f.scheme == PackScheme::zero_point) {
      range = {fminf(range.low, 0.0f), fmaxf(range.high, 0.0f)};
    }
    if (has_offset(f.scheme)) return __fdiv_rn(range.high - range.low, levels);
    const float max_magnitude = fmaxf(range.high, 0.0f - range.low);
    return __fdiv_rn(max_magnitude, f.scheme == PackScheme::fp8 ? kFp8Max : half - 1.0f);
  }
  // x / scale, 0 for NaN and where the scale is 0.
  __device__ __forceinline__ float ratio(float x) const {
    const float quotient = scale_ == 0.0f ? 0.0f : divider_.divide(x);
    return quotient == quotient ? quotient : 0.0f;
  }

  PackScheme scheme_;
  float levels_, half_, scale_, second_;
  Divider divider_;
};

// A row of `bits` bits from codes of a byte each, of which the bits from `down` on count. The
// kLanes lanes of a row share its words.
template <int kLanes>
__device__ __forceinline__ void store_code_row(uint8_t* to, const uint8_t* codes, int lane,
                                               int head_dim, int bits, int down) {
  const int bytes = head_dim * bits / 8, per_byte = 8 / bits;
  const uint32_t mask = 0x01010101u * ((1u << bits) - 1);
  const bool aligned = reinterpret_cast<uintptr_t>(to) % 4 == 0;
  for (int byte = 4 * lane; byte < bytes; byte += 4 * kLanes) {
    int first = byte & ~15, run = 16;
    while (first + run > bytes || first + run <= byte) {
      if (first + run <= byte) first += run;
      run /= 2;
    }
    const uint8_t* from = codes + first * per_byte + byte - first;
    uint32_t word = 0;
    for (int i = 0; i < per_byte; ++i) {
      const uint32_t four = load_run(from + i * run, min(run, 4), true).x;
      word |= (four >> down & mask) << i * bits;
    }
    if (aligned && run >= 4) {
      *reinterpret_cast<Word*>(to + byte) = word;
      continue;
    }
    for (int i = 0; i < min(run, 4); ++i) to[byte + i] = static_cast<uint8_t>(word >> 8 * i);
  }
}

// Unpacking --------------------------------------------------------------------------------------

// Scales and offsets of eight channels of rows whose groups lie along tokens. They stay for the
// next row, which may be of the same group.
class ChannelScales {
 public:
  // `row` is that of the codes; `params` are those of the head, from the first of the channels on.
  __device__ __forceinline__ void apply(float (&x)[8], const PackedRows& packed,
                                        const HalfWord* params, int64_t row) {
    const PackFormat& f = packed.format;
    const auto number = static_cast<uint32_t>(row), size = static_cast<uint32_t>(f.group_size);
    if (number - first_row_ >= size) {
      const uint32_t group = number / size;
      first_row_ = group * size;
      const HalfWord* from = params + group * packed.params_stride_row;
      scale_ = load_eight(from);
      if (has_offset(f.scheme)) second_ = load_eight(from + f.head_dim);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int shift = 16 * (i % 2);
      const float scale = param(static_cast<uint16_t>(scale_.word[i / 2] >> shift));
      const float second = param(static_cast<uint16_t>(second_.word[i / 2] >> shift));
      x[i] = GroupParams(f.scheme, scale, second).number(x[i]);
    }
  }

 private:
  static __device__ __forceinline__ Chunk load_eight(const HalfWord* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0) return load_chunk(from);
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) chunk.word[i] = from[2 * i] | uint32_t{from[2 * i + 1]} << 16;
    return chunk;
  }

  uint32_t first_row_ = 0x80000000u;  // no row is so far
  Chunk scale_ = {}, second_ = {};
};

// Of eight channels of a row whose groups lie along channels, `row` being its params.
__device__ __forceinline__ void apply_group(float (&x)[8], const PackFormat& f, const HalfWord* row,
                                            int channel) {
  const int group = channel / static_cast<int>(f.group_size);
  const int groups = static_cast<int>(f.head_dim) / static_cast<int>(f.group_size);
  const float second = has_offset(f.scheme) ? param(row[groups + group]) : 0.0f;
  const GroupParams params(f.scheme, param(row[group]), second);
  if (f.scheme == PackScheme::zero_point) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = params.number(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = params.number_from_zero(x[i]);
  }
}

// Eight channels of the rows of one head.
struct RowReader {
  const PackedRows& packed;
  int64_t codes_start, params_start;  // of the head
  int channel;
  CodeReader reader;
  ChannelScales scales;
  LevelTable levels;

  __device__ RowReader(const PackedRows& packed, int64_t batch, int64_t head, int channel,
                       const CodeReader& reader)
      : packed(packed),
        codes_start(batch * packed.codes_stride_batch + head * packed.codes_stride_head),
        params_start(batch * packed.params_stride_batch + head * packed.params_stride_head),
        channel(channel), reader(reader), levels(packed, head) {}

  __device__ const uint8_t* codes() const { return packed.codes + codes_start; }
  __device__ const HalfWord* params() const { return packed.params + params_start; }

  // The codes in a row, wherever it lies, a byte each; of a codebook the bytes of their levels.
  __device__ __forceinline__ uint2 read(const uint8_t* row, bool aligned) const {
    const uint2 codes = reader.read(row, aligned);
    return packed.format.scheme == PackScheme::codebook ? levels.look_up(codes) : codes;
  }
  __device__ __forceinline__ void numbers(float (&x)[8], int64_t row) {
    const uint8_t* from = codes() + row * packed.codes_stride_token;
    to_floats(x, read(from, reinterpret_cast<uintptr_t>(from) % 4 == 0), packed.format);
    apply(x, row, params() + row * packed.params_stride_row);
  }
  // The row's codes to numbers; `params` are those of its groups along channels, wherever they lie.
  __device__ __forceinline__ void apply(float (&x)[8], int64_t row, const HalfWord* of_row) {
    if (packed.format.axis == GroupAxis::token) {
      scales.apply(x, packed, params() + channel, row);
    } else {
      apply_group(x, packed.format, of_row, channel);
    }
  }
};

}  // namespace tokred::cuda::packing
