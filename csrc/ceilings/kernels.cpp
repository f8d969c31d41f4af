// The loops of the ceilings, compiled once per instruction set: streams, gathers, and independent
// chains of multiply-adds, with nothing else inside.
#include "ceilings/kernels.h"

#include "common/cpu/simd.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

extern "C" bool tokred_cpu_vnni();

namespace tokred::TOKRED_ISA {
namespace {

using ceilings::kLine;
using ceilings::kReadBlock;
using ceilings::Sink;
using Float = f32x16::N;
using Int = i32x16::N;

// Independent chains: two FMA units of four or five cycles need ten, and the other registers hold
// the operands.
constexpr int kChains = kRegisterBytes == 64 ? 24 : 12;

TOKRED_INLINE const float* floats(const char* p) { return reinterpret_cast<const float*>(p); }

// One line into one of the sums.
TOKRED_INLINE void add_line(const char* line, f32x16& sum) { sum = sum + load(floats(line)); }

template <int kStreams>
void read_streams(const char* data, int64_t bytes, int64_t ahead, Sink* sink) {
  const int64_t length = bytes / kStreams;
  f32x16 sum[kStreams][2] = {};
  for (int64_t block = 0; block < length; block += kReadBlock) {
    for (int64_t at = block; at < block + kReadBlock; at += 2 * kLine) {
#pragma GCC unroll 4
      for (int stream = 0; stream < kStreams; ++stream) {
        const char* line = data + stream * length + at;
        __builtin_prefetch(line + ahead);
        __builtin_prefetch(line + ahead + kLine);
        add_line(line, sum[stream][0]);
        add_line(line + kLine, sum[stream][1]);
      }
    }
  }
  f32x16 total{};
  for (const auto& pair : sum) total = total + pair[0] + pair[1];
  sink->number += tokred::TOKRED_ISA::sum(total);
}

void read(const char* data, int64_t bytes, int streams, int64_t ahead, Sink* sink) {
  if (streams == 4) return read_streams<4>(data, bytes, ahead, sink);
  if (streams == 2) return read_streams<2>(data, bytes, ahead, sink);
  read_streams<1>(data, bytes, ahead, sink);
}

TOKRED_INLINE void store_past_caches(char* p, f32x16 line) {
#pragma GCC unroll 4
  for (int i = 0; i < f32x16::kRegisters; ++i) {
    float* to = reinterpret_cast<float*>(p) + i * f32x16::kWidth;
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)line.r[i]);
#elif defined(__AVX2__)
    _mm256_stream_ps(to, (__m256)line.r[i]);
#elif defined(__SSE2__)
    _mm_stream_ps(to, (__m128)line.r[i]);
#else
    std::memcpy(to, &line.r[i], sizeof line.r[i]);
#endif
  }
}

void copy(const char* source, char* target, int64_t bytes, bool non_temporal, int64_t ahead) {
  if (!non_temporal) {
    for (int64_t at = 0; at < bytes; at += kLine) {
      __builtin_prefetch(source + at + ahead);
      store(reinterpret_cast<float*>(target + at), load(floats(source + at)));
    }
    return;
  }
  for (int64_t at = 0; at < bytes; at += kLine) {
    __builtin_prefetch(source + at + ahead);
    store_past_caches(target + at, load(floats(source + at)));
  }
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// kLines > 0: rows of that many lines.
template <int kLines>
void gather_rows(const char* table, const int32_t* rows, int64_t count, int64_t row_bytes,
                 int64_t ahead, Sink* sink) {
  const int64_t bytes = kLines > 0 ? kLines * kLine : row_bytes;
  f32x16 sum[4] = {};
  for (int64_t i = 0; i < count; ++i) {
    const char* next = table + bytes * rows[i + ahead < count ? i + ahead : i];
    const char* row = table + bytes * rows[i];
#pragma GCC unroll 8
    for (int64_t at = 0; at < bytes; at += kLine) {
      __builtin_prefetch(next + at);
      add_line(row + at, sum[(kLines == 1 ? i : at / kLine) % 4]);
    }
  }
  sink->number += tokred::TOKRED_ISA::sum(sum[0] + sum[1] + sum[2] + sum[3]);
}

void gather(const char* table, const int32_t* rows, int64_t count, int64_t row_bytes, int64_t ahead,
            Sink* sink) {
  switch (row_bytes / kLine) {
    case 1: return gather_rows<1>(table, rows, count, row_bytes, ahead, sink);
    case 2: return gather_rows<2>(table, rows, count, row_bytes, ahead, sink);
    case 4: return gather_rows<4>(table, rows, count, row_bytes, ahead, sink);
    case 8: return gather_rows<8>(table, rows, count, row_bytes, ahead, sink);
    default: return gather_rows<0>(table, rows, count, row_bytes, ahead, sink);
  }
}

// An optimization barrier: the register counts as read and changed, so that no step is folded away
// or moved.
template <class T>
TOKRED_INLINE void keep([[maybe_unused]] T& x) {
#if defined(__SSE2__)
  asm volatile("" : "+v"(x));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(x));
#endif
}

// f(chain) for kChains independent registers, `steps` times; all lanes into the sink.
template <class N, class F>
TOKRED_INLINE void repeat(int64_t steps, Sink* sink, const F& f) {
  N chain[kChains] = {};
  for (N& x : chain) keep(x);  // else they are all the same one
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) chain[i] = f(chain[i]);
  }
  N total = {};
  for (const N& x : chain) total = total + x;
  for (size_t lane = 0; lane < sizeof(N) / 4; ++lane) {
    sink->number += static_cast<float>(total[lane]);
  }
}

int64_t multiply_add(int64_t steps, Sink* sink) {
  // Converges to 2: nothing overflows, nothing is subnormal.
  Float factor = Float{} + 0.5f, term = Float{} + 1.0f;
  keep(factor);
  keep(term);
  repeat<Float>(steps, sink, [&](Float x) {
#if defined(__AVX512F__)
    return (Float)_mm512_fmadd_ps((__m512)x, (__m512)factor, (__m512)term);
#elif defined(__FMA__)
    return (Float)_mm256_fmadd_ps((__m256)x, (__m256)factor, (__m256)term);
#else
    return x * factor + term;
#endif
  });
  return steps * kChains * 2 * f32x16::kWidth;
}

// Pairs of sixteen-bit products, as packed caches are read: one instruction with VNNI, two without.
int64_t dot_int16(int64_t steps, Sink* sink) {
  Int a = Int{} + 0x00010001, b = Int{} + 0x00010002;
  keep(a);
  keep(b);
#if defined(__AVX512F__)
  if (tokred_cpu_vnni()) {
    repeat<Int>(steps, sink, [&](Int x) {
      // Every assembler knows it; the compiler would want the whole file to be for such machines.
      asm("vpdpwssd %2, %1, %0" : "+v"(x) : "v"(a), "v"(b));
      return x;
    });
    return steps * kChains * 4 * i32x16::kWidth;
  }
#endif
  repeat<Int>(steps, sink, [&](Int x) {
#if defined(__AVX2__)
    // GCC would do one product for all chains.
    Int product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(x), "=&v"(product) : "v"(a), "v"(b));
    return x;
#elif defined(__SSE2__)
    keep(a);
    return x + (Int)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    keep(a);
    return x + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
  });
  return steps * kChains * 4 * i32x16::kWidth;
}

// Quads of eight-bit products: only where one instruction does them.
int64_t dot_int8([[maybe_unused]] int64_t steps, [[maybe_unused]] Sink* sink) {
#if defined(__AVX512F__)
  if (tokred_cpu_vnni()) {
    Int a = Int{} + 0x01010101, b = Int{} + 0x01010102;
    keep(a);
    keep(b);
    repeat<Int>(steps, sink, [&](Int x) {
      asm("vpdpbusd %2, %1, %0" : "+v"(x) : "v"(a), "v"(b));
      return x;
    });
    return steps * kChains * 8 * i32x16::kWidth;
  }
#endif
  return 0;
}

}  // namespace

extern const ceilings::Kernels kCeilings;
const ceilings::Kernels kCeilings{read, copy, gather, multiply_add, dot_int16, dot_int8};

}  // namespace tokred::TOKRED_ISA
