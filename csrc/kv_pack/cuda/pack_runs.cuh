// kv_pack and kv_append of 2, 4 or 8 bits where rows of codes are runs of sixteen bytes: a lane
// owns eight bytes of a row of codes, with all the channels whose codes they hold, row after row.
#pragma once

#include "kv_pack/cuda/kv_pack.cuh"

namespace tokred::cuda::packing {

// Minimum and maximum of stored numbers, two of 16 bits at a time or one of 32; NaN where one is.
#ifdef TOKRED_SIMT

inline uint32_t min_stored(float, uint32_t a, uint32_t b) {
  return __float_as_uint(min_or_nan(__uint_as_float(a), __uint_as_float(b)));
}
inline uint32_t max_stored(float, uint32_t a, uint32_t b) {
  return __float_as_uint(max_or_nan(__uint_as_float(a), __uint_as_float(b)));
}
template <class T>
float half_of(uint32_t pair, int i) {
  return to_float(T{static_cast<uint16_t>(pair >> 16 * i)});
}
template <class T>
uint32_t min_stored(T, uint32_t a, uint32_t b) {
  return pack_pair<T>(min_or_nan(half_of<T>(a, 0), half_of<T>(b, 0)),
                      min_or_nan(half_of<T>(a, 1), half_of<T>(b, 1)));
}
template <class T>
uint32_t max_stored(T, uint32_t a, uint32_t b) {
  return pack_pair<T>(max_or_nan(half_of<T>(a, 0), half_of<T>(b, 0)),
                      max_or_nan(half_of<T>(a, 1), half_of<T>(b, 1)));
}
// 1 / x within a unit in the last place.
inline float reciprocal_approx(float x) { return 1.0f / x; }

#else

__device__ __forceinline__ uint32_t min_stored(float, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("min.NaN.f32 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t max_stored(float, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.NaN.f32 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t min_stored(f16, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t max_stored(f16, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t min_stored(bf16, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t max_stored(bf16, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// 1 / x within a unit in the last place.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

// Eight neighbouring channels as they are stored.
template <class T>
struct StoredEight {
  static constexpr int kChunks = static_cast<int>(sizeof(T)) / 2;
  Chunk chunk[kChunks];

  __device__ __forceinline__ void load(const T* from) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) chunk[c] = load_chunk(from + 8 / kChunks * c);
  }
  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(chunk[i / 4].word[i % 4]);
    } else if constexpr (std::is_same_v<T, bf16>) {
      const uint32_t pair = chunk[0].word[i / 2];
      return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
    } else {
      return to_float(T{static_cast<uint16_t>(chunk[0].word[i / 2] >> 16 * (i % 2))});
    }
  }
};

// The extremes of numbers as they are stored; NaN if one is, unlike Extremes.
template <class T>
struct StoredRange {
  uint32_t low, high;

  __device__ __forceinline__ explicit StoredRange(const StoredEight<T>& x)
      : low(x.chunk[0].word[0]), high(low) {
    join(x);
  }
  __device__ __forceinline__ void join(const StoredEight<T>& x) {
#pragma unroll
    for (int c = 0; c < x.kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low = min_stored(T{}, low, x.chunk[c].word[i]);
        high = max_stored(T{}, high, x.chunk[c].word[i]);
      }
    }
  }
  // Over `lanes` neighbouring lanes, a power of two.
  __device__ __forceinline__ void reduce(int lanes) {
    for (int step = 1; step < lanes; step *= 2) {
      low = min_stored(T{}, low, __shfl_xor_sync(kAllLanes, low, step));
      high = max_stored(T{}, high, __shfl_xor_sync(kAllLanes, high, step));
    }
  }
  __device__ __forceinline__ Extremes extremes() const {
    if constexpr (sizeof(T) == 4) return {__uint_as_float(low), __uint_as_float(high)};
    const StoredEight<T> swapped = {{{{low >> 16, high >> 16, 0, 0}}}};
    StoredEight<T> both = {{{{min_stored(T{}, low, swapped.chunk[0].word[0]),
                              max_stored(T{}, high, swapped.chunk[0].word[1]), 0, 0}}}};
    return {both.get(0), both.get(2)};
  }
};

// Codes of a group from a product instead of a quotient: bits kFraction and up of word(x) are the
// code of x, of the bits below all are close to 0 where its quotient is so close to halfway between
// two codes that the product may be on the other side. An error of the reciprocal, of the product
// and of the quotient of Quantizer move a quotient below 2^kBits by less than kDoubt of those bits.
template <int kBits>
struct FastQuantizer {
  static constexpr int kFraction = kBits == 8 ? 15 : 16;
  static constexpr uint32_t kDoubt = kBits == 8 ? 3 : 1;
  static constexpr uint32_t kFractionMask = (1u << kFraction) - 1;
  float scale, second;
  bool sure;  // else Quantizer has to find all codes of the group

  // `divisor`: what makes a scale of a range, see RunLayout.
  __device__ __forceinline__ FastQuantizer(PackScheme scheme, Extremes range, float divisor,
                                           float reciprocal)
      : second(0.0f) {
    range = {range.low + 0.0f, range.high + 0.0f};
    float span = range.high - range.low, middle = 0.0f;
    if (scheme == PackScheme::zero_point) {
      span = fmaxf(range.high, 0.0f) - fminf(range.low, 0.0f);
    } else if (scheme == PackScheme::symmetric) {
      span = fmaxf(range.high, 0.0f - range.low);
      middle = static_cast<float>(1 << (kBits - 1));
    }
    scale = __fmul_rn(span, reciprocal);
#pragma unroll
    for (int i = 0; i < 2; ++i) scale = fmaf(fmaf(-scale, divisor, span), reciprocal, scale);
    sure = range.low <= range.high && (span == 0.0f || (scale >= 0x1p-60f && scale <= 0x1p60f));
    factor_ = span == 0.0f ? 0.0f : reciprocal_approx(scale) * static_cast<float>(1 << kFraction);
    if (scheme == PackScheme::asymmetric) {
      second = range.low;
    } else if (scheme == PackScheme::zero_point && span > 0.0f) {
      middle = second = rintf(__fdiv_rn(0.0f - fminf(range.low, 0.0f), scale));
      const float last = rintf(__fdiv_rn(fmaxf(range.high, 0.0f), scale)) + second;
      sure = sure && last <= static_cast<float>((1 << kBits) - 1);
    }
    less_ = scheme == PackScheme::asymmetric ? second : 0.0f;
    start_ = fmaf(middle + 0.5f, static_cast<float>(1 << kFraction), 0x1p23f + kDoubt);
  }

  __device__ __forceinline__ uint32_t word(float x) const {
    return __float_as_uint(fmaf(x - less_, factor_, start_));
  }
  static __device__ __forceinline__ bool doubtful(uint32_t min_fraction) {
    return min_fraction <= 2 * kDoubt;
  }

 private:
  float less_, factor_, start_;
};

// The codes of four words, a byte each.
template <int kBits>
__device__ __forceinline__ uint32_t code_bytes_of(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if constexpr (kBits == 8) {  // bits 15 .. 22
    a += a, b += b, c += c, d += d;
  }
  return __byte_perm(__byte_perm(a, b, 0x0062), __byte_perm(c, d, 0x0062), 0x5410);
}

struct __attribute__((may_alias, aligned(8))) EightBytes {
  uint32_t x, y;
};

// This lane's part of a row and of every `rows`-th after it: eight bytes of codes, and their
// channels, pieces of eight neighbours, sixteen apart. Lanes beyond a row have those of its
// beginning, and store nothing.
template <class T, int kBits>
struct RunLane {
  static constexpr int kPieces = 8 / kBits;
  using Row = StoredEight<T>[kPieces];
  const PackedHead<T>& head;
  const int lane, channel, rows;
  const int last, held;  // tokens
  const bool active;
  int token;
  const T* from;  // of the row after, wherever it is
  uint8_t* codes;
  uint16_t* params;

  __device__ RunLane(const PackedHead<T>& head, const RunLayout& layout, uint32_t unit)
      : head(head), lane(lane_id() % layout.lanes),
        channel(lane / 2 * (16 * kPieces) + lane % 2 * 8), rows(kPackThreads / layout.lanes),
        last(static_cast<int>(head.tokens.last)), held(static_cast<int>(head.tokens.held)),
        active(channel < head.p.packed.format.head_dim),
        token(static_cast<int>(head.tokens.first) + static_cast<int>(unit * kRunSteps) * rows +
              static_cast<int>(threadIdx.x) / layout.lanes) {
    from = head.x_row(token - held) + (active ? channel : 0);
    codes = head.codes() + 8 * lane;
    params = head.params() + channel / static_cast<int>(head.p.packed.format.group_size);
    codes += token * head.p.packed.codes_stride_token;
    params += token * head.p.packed.params_stride_row;
  }

  // Loads the row that comes `ahead` rows of this lane later, which is the one after the last
  // loaded; leaves x as it is beyond the last.
  __device__ __forceinline__ void load_next(Row& x, int ahead) {
    const int next = token + ahead * rows;
    if (next < last) {
      const T* row = from;
      if (next < held) row = head.window_row(next) + (active ? channel : 0);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) x[i].load(row + 16 * i);
    }
    from += rows * head.p.x.stride_token;
  }
  __device__ __forceinline__ void advance() {
    token += rows;
    codes += rows * head.p.packed.codes_stride_token;
    params += rows * head.p.packed.params_stride_row;
  }
  __device__ __forceinline__ bool stores() const { return active && token < last; }
};

// A group's codes, piece by piece, in 8 / kBits bits of every byte; exactly as Quantizer has them.
template <class T>
__device__ __forceinline__ uint2 exact_codes(const StoredEight<T>& x, const Quantizer& quantizer) {
  uint2 codes{0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    (i < 4 ? codes.x : codes.y) |= quantizer.code(x.get(i)) << 8 * (i % 4);
  }
  return codes;
}
// The same from products; `smallest` becomes the minimum fraction so far.
template <class T, int kBits>
__device__ __forceinline__ uint2 fast_codes(const StoredEight<T>& x,
                                            const FastQuantizer<kBits>& quantizer,
                                            uint32_t& smallest) {
  uint32_t word[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    word[i] = quantizer.word(x.get(i));
    smallest = min(smallest, word[i] & quantizer.kFractionMask);
  }
  return {code_bytes_of<kBits>(word[0], word[1], word[2], word[3]),
          code_bytes_of<kBits>(word[4], word[5], word[6], word[7])};
}

// Blocks of a multiprocessor, by the registers that two rows take.
template <class T, int kBits>
inline constexpr int kRunBlocks = kBits > 2        ? 3
                                  : sizeof(T) == 2 ? 2
                                                   : 1;

// Groups along channels, of which this lane has kGroups.
template <class T, int kBits, int kGroups>
__global__ void __launch_bounds__(kPackThreads, kRunBlocks<T, kBits>)
    pack_runs_kernel(const __grid_constant__ KvAppendParams p,
                     const __grid_constant__ RunLayout layout) {
  using Lane = RunLane<T, kBits>;
  constexpr int kPieces = Lane::kPieces, kOfGroup = kPieces / kGroups;
  const PackFormat& f = p.packed.format;
  const auto units = static_cast<uint32_t>(layout.units);
  const PackedHead<T> head(p, blockIdx.x / units);
  if (!head.tokens.valid()) return;
  Lane mine(head, layout, blockIdx.x % units);
  const int groups = static_cast<int>(f.head_dim) / static_cast<int>(f.group_size);
  const bool of_group = mine.lane % layout.group_lanes == 0;  // this lane stores params
  typename Lane::Row x = {}, next = {};
  mine.load_next(x, 0);
#pragma unroll 1
  for (int step = 0; step < kRunSteps; ++step) {
    if (__all_sync(kAllLanes, mine.token >= mine.last)) return;
    mine.load_next(next, 1);
    uint2 all{0, 0};
    uint32_t smallest = ~0u;
    bool sure = true;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      StoredRange<T> range(x[g * kOfGroup]);
#pragma unroll
      for (int i = 1; i < kOfGroup; ++i) range.join(x[g * kOfGroup + i]);
      range.reduce(layout.group_lanes);
      const FastQuantizer<kBits> quantizer(f.scheme, range.extremes(), layout.divisor,
                                           layout.reciprocal);
      sure = sure && quantizer.sure;
#pragma unroll
      for (int i = g * kOfGroup; i < (g + 1) * kOfGroup; ++i) {
        const uint2 of_piece = fast_codes(x[i], quantizer, smallest);
        all.x += of_piece.x << kBits * i;
        all.y += of_piece.y << kBits * i;
      }
      if (mine.stores() && of_group) {
        mine.params[g] = storable(quantizer.scale);
        if (has_offset(f.scheme)) mine.params[groups + g] = storable(quantizer.second);
      }
    }
    if (__any_sync(kAllLanes, !sure || FastQuantizer<kBits>::doubtful(smallest))) {
      all = {0, 0};
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        Extremes range;
#pragma unroll
        for (int i = 0; i < 8 * kOfGroup; ++i) range.add(x[g * kOfGroup + i / 8].get(i % 8));
        range.reduce(layout.group_lanes, 0);
        const Quantizer quantizer(f, range);
#pragma unroll
        for (int i = g * kOfGroup; i < (g + 1) * kOfGroup; ++i) {
          const uint2 of_piece = exact_codes(x[i], quantizer);
          all.x |= of_piece.x << kBits * i;
          all.y |= of_piece.y << kBits * i;
        }
        if (mine.stores() && of_group) quantizer.store(mine.params, g, groups);
      }
    }
    if (mine.stores()) *reinterpret_cast<EightBytes*>(mine.codes) = {all.x, all.y};
#pragma unroll
    for (int i = 0; i < kPieces; ++i) x[i] = next[i];
    mine.advance();
  }
}

}  // namespace tokred::cuda::packing
