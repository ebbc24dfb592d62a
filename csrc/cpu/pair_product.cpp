#include "pair_product.h"

#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <new>

// Nothing of this file needs more than the baseline until has_pair_product() said yes.
#define COACHHOOK_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace coachhook {
namespace {

constexpr int kLanes = 16;
// Sums in registers: 4 vectors of tokens by 6 rows of S.
constexpr int kVectors = 4, kRows = 6;
constexpr int kTile = kLanes * kVectors;
// Pairs of neighbours in n that are summed in registers.
constexpr int kPairs = 320;
// Words from one row of the cut S to the next: not a multiple of a page.
constexpr int kStride = kPairs + kLanes;

// Sums of as many tokens as go through S together, in words: 8 MiB.
constexpr int64_t kKept = 2 << 20;

constexpr int64_t words_per_tile(int64_t rank) {
  return (rank + kRows - 1) / kRows * kRows * kTile;
}

// Kept by the thread: fresh pages of every call would have to be cleared first.
class Scratch {
 public:
  ~Scratch() { std::free(words_); }
  uint32_t* of(size_t words) {
    if (words > size_) {
      std::free(words_);
      size_ = 0;
      words = (words + kLanes - 1) / kLanes * kLanes;
      words_ = static_cast<uint32_t*>(std::aligned_alloc(64, words * sizeof(uint32_t)));
      if (words_ == nullptr) throw std::bad_alloc();
      size_ = words;
    }
    return words_;
  }

 private:
  uint32_t* words_ = nullptr;
  size_t size_ = 0;
};

// The lines of x that come next, asked for while the sums of the present ones run.
struct Ahead {
  uintptr_t first;
  int64_t row_bytes;
  int line;
};

COACHHOOK_AVX512 inline void ask(Ahead& ahead) {
  const int64_t row = ahead.line % kTile, column = ahead.line / kTile;
  _mm_prefetch(reinterpret_cast<const char*>(ahead.first + row * ahead.row_bytes + column * 64),
               _MM_HINT_T1);
  ++ahead.line;
}

// features[row][token] (+)= sum over the block of x[token] * (high + low)[row].
template <int Rows, int Vectors>
COACHHOOK_AVX512 void multiply(const uint32_t* x, const uint32_t* s, int pairs, float* sums,
                               bool first, Ahead& ahead) {
  __m512 acc[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) acc[r][v] = _mm512_setzero_ps();
  for (int p = 0; p < pairs; ++p) {
    if (p % 4 == 0) ask(ahead);
    __m512bh token[Vectors];
    for (int v = 0; v < Vectors; ++v)
      token[v] = (__m512bh)_mm512_load_si512(x + p * kTile + v * kLanes);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) {
        const auto w =
            (__m512bh)_mm512_set1_epi32(static_cast<int>(s[p + (2 * r + half) * kStride]));
        for (int v = 0; v < Vectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], token[v], w);
      }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) {
      float* to = sums + r * kTile + v * kLanes;
      if (!first) acc[r][v] = _mm512_add_ps(acc[r][v], _mm512_load_ps(to));
      _mm512_store_ps(to, acc[r][v]);
    }
}

template <int Vectors>
COACHHOOK_AVX512 void multiply_rows(int rows, const uint32_t* x, const uint32_t* s, int pairs,
                                    float* sums, bool first, Ahead& ahead) {
  switch (rows) {
    case 1:
      return multiply<1, Vectors>(x, s, pairs, sums, first, ahead);
    case 2:
      return multiply<2, Vectors>(x, s, pairs, sums, first, ahead);
    case 3:
      return multiply<3, Vectors>(x, s, pairs, sums, first, ahead);
    case 4:
      return multiply<4, Vectors>(x, s, pairs, sums, first, ahead);
    case 5:
      return multiply<5, Vectors>(x, s, pairs, sums, first, ahead);
    default:
      return multiply<6, Vectors>(x, s, pairs, sums, first, ahead);
  }
}

COACHHOOK_AVX512 inline __m512 widen(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

COACHHOOK_AVX512 inline __mmask16 lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// One row of a block of S, cut: the high halves, then the low ones, zeros behind the end.
COACHHOOK_AVX512 void cut(const float* s, int64_t columns, uint32_t* out) {
  for (int64_t k = 0; k < columns; k += 32) {
    const __m512 a = _mm512_maskz_loadu_ps(lanes(columns - k), s + k);
    const __m512 b = _mm512_maskz_loadu_ps(lanes(columns - k - 16), s + k + 16);
    const auto high = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    const __m512 low_a = _mm512_sub_ps(a, widen(_mm512_castsi512_si256(high)));
    const __m512 low_b = _mm512_sub_ps(b, widen(_mm512_extracti64x4_epi64(high, 1)));
    _mm512_storeu_si512(out + k / 2, high);
    _mm512_storeu_si512(out + kStride + k / 2, (__m512i)_mm512_cvtne2ps_pbh(low_b, low_a));
  }
}

COACHHOOK_AVX512 inline void transpose(__m512i* a) {
  __m512i b[16];
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      a[4 * i + 2 * j] = _mm512_unpacklo_epi64(b[4 * i + j], b[4 * i + j + 2]);
      a[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(b[4 * i + j], b[4 * i + j + 2]);
    }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j) {
      b[8 * i + j] = _mm512_shuffle_i32x4(a[8 * i + j], a[8 * i + 4 + j], 0x88);
      b[8 * i + 4 + j] = _mm512_shuffle_i32x4(a[8 * i + j], a[8 * i + 4 + j], 0xdd);
    }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j) {
      a[4 * i + j] = _mm512_shuffle_i32x4(b[4 * i + j], b[8 + 4 * i + j], 0x88);
      a[8 + 4 * i + j] = _mm512_shuffle_i32x4(b[4 * i + j], b[8 + 4 * i + j], 0xdd);
    }
}

// Pairs of n by tokens, so that one load brings a pair of 16 tokens; zeros behind the ends.
COACHHOOK_AVX512 void interleave(const uint16_t* x, int64_t row_stride, int tokens, int64_t columns,
                                 int vectors, uint32_t* out) {
  for (int v = 0; v < vectors; ++v)
    for (int64_t k = 0; k < columns; k += 32) {
      const int64_t left = columns - k;
      const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
      __m512i a[16];
      for (int t = 0; t < 16; ++t) {
        const int token = v * kLanes + t;
        a[t] = token < tokens ? _mm512_maskz_loadu_epi16(mask, x + token * row_stride + k)
                              : _mm512_setzero_si512();
      }
      transpose(a);
      for (int t = 0; t < 16; ++t) _mm512_store_si512(out + (k / 2 + t) * kTile + v * kLanes, a[t]);
    }
}

// Out of the scratch [rank][tile]: features [rank, tokens] and the norm of every token.
COACHHOOK_AVX512 void finish(const PairProductParams& p, int64_t first, int tokens,
                             const float* sums) {
  for (int v = 0; v * kLanes < tokens; ++v) {
    const __mmask16 low = lanes(tokens - v * kLanes), high = low >> 8;
    __m512d square_low = _mm512_setzero_pd(), square_high = _mm512_setzero_pd();
    for (int64_t r = 0; r < p.rank; ++r) {
      const __m512 value = _mm512_load_ps(sums + r * kTile + v * kLanes);
      _mm512_mask_storeu_ps(p.features + r * p.tokens + first + v * kLanes, low, value);
      const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(value));
      const __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1));
      square_low = _mm512_fmadd_pd(a, a, square_low);
      square_high = _mm512_fmadd_pd(b, b, square_high);
    }
    double* to = p.norms + first + v * kLanes;
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(low), _mm512_sqrt_pd(square_low));
    _mm512_mask_storeu_pd(to + 8, static_cast<__mmask8>(high), _mm512_sqrt_pd(square_high));
  }
}

// The tokens of some tiles.
void multiply_tiles(const PairProductParams& p, int64_t begin, int64_t end) {
  thread_local Scratch cut_s, tile_of_x, kept;
  const int64_t per_tile = words_per_tile(p.rank);
  uint32_t* const s = cut_s.of(2 * kStride * p.rank);
  uint32_t* const x = tile_of_x.of(kTile * kPairs);
  auto* const sums = reinterpret_cast<float*>(kept.of((end - begin) * per_tile));
  const int64_t row_bytes = p.x_row_stride * static_cast<int64_t>(sizeof(uint16_t));
  const auto tokens_of = [&p](int64_t tile) {
    return static_cast<int>(std::min<int64_t>(kTile, p.tokens - tile * kTile));
  };
  for (int64_t k = 0; k < p.n; k += 2 * kPairs) {
    const int64_t columns = std::min<int64_t>(2 * kPairs, p.n - k);
    const int pairs = static_cast<int>((columns + 1) / 2);
    for (int64_t r = 0; r < p.rank; ++r)
      cut(p.s + r * p.s_row_stride + k, columns, s + r * 2 * kStride);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int tokens = tokens_of(tile), vectors = (tokens + kLanes - 1) / kLanes;
      interleave(p.x + tile * kTile * p.x_row_stride + k, p.x_row_stride, tokens, columns, vectors,
                 x);
      const bool last = tile + 1 == end;
      const int64_t token = (last ? begin : tile + 1) * kTile, column = last ? k + 2 * kPairs : k;
      Ahead ahead{reinterpret_cast<uintptr_t>(p.x) + token * row_bytes + 2 * column, row_bytes, 0};
      for (int64_t r = 0; r < p.rank; r += kRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, p.rank - r));
        float* to = sums + (tile - begin) * per_tile + r * kTile;
        const uint32_t* from = s + r * 2 * kStride;
        switch (vectors) {
          case 1:
            multiply_rows<1>(rows, x, from, pairs, to, k == 0, ahead);
            break;
          case 2:
            multiply_rows<2>(rows, x, from, pairs, to, k == 0, ahead);
            break;
          case 3:
            multiply_rows<3>(rows, x, from, pairs, to, k == 0, ahead);
            break;
          default:
            multiply_rows<4>(rows, x, from, pairs, to, k == 0, ahead);
            break;
        }
      }
    }
  }
  for (int64_t tile = begin; tile < end; ++tile)
    finish(p, tile * kTile, tokens_of(tile), sums + (tile - begin) * per_tile);
}

}  // namespace

bool has_pair_product() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}

void pair_product(const PairProductParams& p) {
  const int64_t tiles = (p.tokens + kTile - 1) / kTile;
  const int64_t step = std::max<int64_t>(1, kKept / words_per_tile(p.rank));
  for (int64_t begin = 0; begin < tiles; begin += step)
    multiply_tiles(p, begin, std::min(begin + step, tiles));
}

}  // namespace coachhook
