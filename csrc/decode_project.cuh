// The first launch of decoding: [P; f] = [W0; S] x, and with cues [P; f; c], in slices of the
// depth.
//
// Which lane adds which terms, and when, follows from the sizes of the matrices, never from the
// tokens: a token has the same bits alone and in any batch.
#pragma once

#include <type_traits>

#include "common/mma_16x8.cuh"
#include "decode.h"

namespace coachhook {

// One matrix of the stack, and how its product with x is cut.
struct Product {
  const void* matrix = nullptr;  // [rows, depth]
  int64_t rows = 0;
  int64_t row_stride = 0;
  int64_t slice = 0;  // terms of the sum per block
  int64_t splits = 0;
  int64_t tiles = 0;  // blocks along the rows
  int depth_warps = 1;
  float* part = nullptr;  // [splits, tokens, pitch]
  int64_t pitch = 0;

  __host__ __device__ int64_t blocks() const { return tiles * splits; }
};

// A coefficient and whose it is.
struct Best {
  float value;
  int index;
};

struct DecodePlan {
  Product frozen;  // no rows where the frozen product was computed elsewhere
  Product hook;
  Product cues;               // no rows without
  double* state = nullptr;    // [sequences, 3] before this call
  bool sums_first = false;    // partial sums are added up by a launch of their own
  bool summed = false;        // and the last one reads f and the squares, not f alone
  float* features = nullptr;  // [tokens, hook.pitch]
  float* squares = nullptr;   // [tokens, square_tiles] sums of f^2
  int64_t square_tiles = 0;
  bool selects = false;  // each token takes the column of one edit: kernels of decode_own.cuh
  Best* best = nullptr;  // [tokens, best_tiles]
  int64_t best_tiles = 0;
  int outputs_per_warp = 0;
  int64_t sequences_per_block = 1;
};

// kTiles = 1: 8 tokens a block; many small blocks, many reads in flight. kTiles = 8: 64; a warp
// reads twice the rows, so that x is fetched half as often.
template <int kTiles>
struct ProjectTraits {
  static constexpr int kWarps = kTiles == 1 ? 4 : 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = kTiles == 1 ? 1 : 2;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kAhead = kTiles == 1 ? 4 : 2;  // steps in flight
  // Blocks per multiprocessor: left alone, the compiler aims at four narrow ones and spills.
  static constexpr int kBlocks = kTiles == 1 ? 3 : 1;
  static constexpr int kTokens = 8 * kTiles;
  static_assert(kTokens <= kDecodeTokens, "tiles of 8 tokens");
};

struct StepTraits {
  static constexpr int kGroups = 2;      // 16-byte reads of a lane per row and step
  static constexpr int kDepthWarps = 4;  // warps that share the rows of a short matrix
  template <typename T>
  static constexpr int kDepth = kGroups * 4 * Chunk<T>::kSize;  // terms per step
};

// 16 bytes in the registers of a fragment.
struct alignas(16) Words {
  uint32_t word[4];
};

template <typename T>
__device__ __forceinline__ uint32_t bits_of(T value) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(value);
  } else {
    return *reinterpret_cast<const uint16_t*>(&value);
  }
}

// Elements [start, start + 16 bytes) of a row, zero from `end` on. Alignment chooses how they are
// read, not what; an aligned row ends between two reads.
template <typename T, bool kAligned, bool kStreaming>
__device__ __forceinline__ Words load_words(const T* row, int64_t start, int64_t end) {
  constexpr int kSize = Chunk<T>::kSize;
  Words words = {{0u, 0u, 0u, 0u}};
  if constexpr (kAligned) {
    if (start < end) {
      const uint4* address = reinterpret_cast<const uint4*>(row + start);
      const uint4 v = kStreaming ? __ldcs(address) : __ldg(address);
      words = {{v.x, v.y, v.z, v.w}};
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (start + i < end) {
        words.word[i * sizeof(T) / 4] |= bits_of(row[start + i]) << (i * sizeof(T) % 4 * 8);
      }
    }
  }
  return words;
}

// Terms of x beside a 16-byte read of a matrix of TW: x itself, or 16-bit x as float32, exactly.
template <typename TX, typename TW, bool kAligned>
__device__ __forceinline__ Words load_tokens(const TX* row, int64_t start, int64_t end) {
  if constexpr (sizeof(TX) == sizeof(TW)) {
    return load_words<TX, kAligned, false>(row, start, end);
  } else {
    Words words = {{0u, 0u, 0u, 0u}};
    if constexpr (kAligned) {
      struct alignas(8) Half {
        TX value[4];
      };
      if (start < end) {
        const Half half = *reinterpret_cast<const Half*>(row + start);
#pragma unroll
        for (int i = 0; i < 4; ++i) words.word[i] = __float_as_uint(to_float(half.value[i]));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (start + i < end) words.word[i] = __float_as_uint(to_float(row[start + i]));
      }
    }
    return words;
  }
}

// The left operand of the two products of a read: rows g and g + 8, as they are or cut in two.
template <typename T>
struct Rows {
  uint32_t high[2][4];
  uint32_t low[sizeof(T) == 4 ? 2 : 1][4];

  __device__ __forceinline__ Rows(const Words& upper, const Words& lower) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t words[4] = {upper.word[2 * j], lower.word[2 * j], upper.word[2 * j + 1],
                                 lower.word[2 * j + 1]};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          const Tf32Pair pair = split_tf32(__uint_as_float(words[i]));
          high[j][i] = pair.high;
          low[j][i] = pair.low;
        } else {
          high[j][i] = words[i];
        }
      }
    }
  }
};

// sum += rows x over the terms of one read. Tensor cores truncate as they add: their sums are kept
// short and gathered in float32.
template <typename TX, typename TW>
__device__ __forceinline__ void multiply(float (&sum)[4], const Rows<TW>& rows, const Words& x) {
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if constexpr (sizeof(TW) == 2) {
      const uint32_t b[2] = {x.word[2 * j], x.word[2 * j + 1]};
      mma<TW>(part, rows.high[j], b);
    } else if constexpr (sizeof(TX) == 2) {
      const uint32_t b[2] = {x.word[2 * j], x.word[2 * j + 1]};
      mma<float>(part, rows.low[j], b);
      mma<float>(part, rows.high[j], b);
    } else {
      const Tf32Pair b0 = split_tf32(__uint_as_float(x.word[2 * j]));
      const Tf32Pair b1 = split_tf32(__uint_as_float(x.word[2 * j + 1]));
      const uint32_t high[2] = {b0.high, b1.high}, low[2] = {b0.low, b1.low};
      mma<float>(part, rows.low[j], high);
      mma<float>(part, rows.high[j], low);
      mma<float>(part, rows.high[j], high);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += part[i];
}

// One block's rows and slice of a product.
template <typename TX, typename TW, int kTiles, bool kAligned>
__device__ __forceinline__ void project_rows(const DecodeParams& p, const Product& product,
                                             int64_t block) {
  using Traits = ProjectTraits<kTiles>;
  constexpr int kRowTiles = Traits::kRowTiles, kAhead = Traits::kAhead;
  constexpr int kGroups = StepTraits::kGroups, kSize = Chunk<TW>::kSize;
  constexpr int kStep = StepTraits::kDepth<TW>;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int row_warps = Traits::kWarps / product.depth_warps;
  const int depth_warp = warp / row_warps;
  const int64_t split = block / product.tiles;
  const int64_t first_row =
      (block % product.tiles * row_warps + warp % row_warps) * Traits::kWarpRows;
  const int64_t begin = split * product.slice;
  const int64_t end = begin + product.slice < p.depth ? begin + product.slice : p.depth;
  const int64_t stride = static_cast<int64_t>(product.depth_warps) * kStep;
  const TW* matrix = static_cast<const TW*>(product.matrix);
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * Traits::kTokens;
  const int tokens = static_cast<int>(p.gate.rows - first_token);  // may be more than this block's
  const TX* x = static_cast<const TX*>(p.x) + first_token * p.x_row_stride;

  Words ahead[kAhead][kRowTiles][2][kGroups];
  const auto fetch = [&](Words(&slot)[kRowTiles][2][kGroups], int64_t k) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + r * 16 + half * 8 + g;
        // A row past the last reads nothing and counts as zero.
        const int64_t stop = row < product.rows ? end : 0;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          slot[r][half][group] = load_words<TW, kAligned, true>(matrix + row * product.row_stride,
                                                                k + (group * 4 + t) * kSize, stop);
        }
      }
    }
  };

  float sum[kRowTiles][kTiles][4] = {};
  int64_t k = begin + depth_warp * kStep;
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot) fetch(ahead[slot], k + slot * stride);
  for (; k < end; k += kAhead * stride) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) {
      const int64_t at = k + slot * stride;
      if (at >= end) break;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const Rows<TW> upper(ahead[slot][0][0][group], ahead[slot][0][1][group]);
        const Rows<TW> lower(ahead[slot][kRowTiles - 1][0][group],
                             ahead[slot][kRowTiles - 1][1][group]);
        const int64_t start = at + (group * 4 + t) * kSize;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (tile * 8 >= tokens) break;
          const int token = tile * 8 + g;
          const Words terms = load_tokens<TX, TW, kAligned>(x + token * p.x_row_stride, start,
                                                            token < tokens ? end : 0);
          multiply<TX, TW>(sum[0][tile], upper, terms);
          if constexpr (kRowTiles == 2) multiply<TX, TW>(sum[1][tile], lower, terms);
        }
      }
      fetch(ahead[slot], at + kAhead * stride);
    }
  }

  __shared__ float scratch[Traits::kWarps][kRowTiles * 4][kWarpSize];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile * 8 >= tokens) break;
    if (product.depth_warps > 1) {
#pragma unroll
      for (int i = 0; i < kRowTiles * 4; ++i) scratch[warp][i][lane] = sum[i / 4][tile][i % 4];
      __syncthreads();
      if (depth_warp == 0) {
        for (int d = 1; d < product.depth_warps; ++d) {
#pragma unroll
          for (int i = 0; i < kRowTiles * 4; ++i) {
            sum[i / 4][tile][i % 4] += scratch[warp + d * row_warps][i][lane];
          }
        }
      }
      __syncthreads();
    }
    if (depth_warp > 0) continue;
#pragma unroll
    for (int i = 0; i < kRowTiles * 4; ++i) {
      const int64_t row = first_row + i / 2 * 8 + g;
      const int64_t token = tile * 8 + 2 * t + i % 2;
      if (row < product.rows && token < tokens) {
        product.part[(split * p.gate.rows + first_token + token) * product.pitch + row] =
            sum[i / 4][tile][i % 4];
      }
    }
  }
}

template <typename TX, typename TS, int kTiles, bool kAligned>
__global__ void __launch_bounds__(ProjectTraits<kTiles>::kThreads, ProjectTraits<kTiles>::kBlocks)
    decode_project_kernel(const DecodeParams p, const DecodePlan plan) {
  const int64_t block = blockIdx.x;
  let_next_kernel_start();
  if (block == 0 && blockIdx.y == 0 && p.gate.state != nullptr) {
    for (int64_t i = threadIdx.x; i < p.gate.sequences * 3; i += ProjectTraits<kTiles>::kThreads) {
      plan.state[i] = p.gate.state[i];
    }
  }
  const int64_t frozen = plan.frozen.blocks(), hook = frozen + plan.hook.blocks();
  if constexpr (std::is_same_v<TX, TS>) {
    const Product& product = block < frozen ? plan.frozen : block < hook ? plan.hook : plan.cues;
    const int64_t before = block < frozen ? 0 : block < hook ? frozen : hook;
    project_rows<TX, TS, kTiles, kAligned>(p, product, block - before);
  } else if (block < frozen) {
    project_rows<TX, TX, kTiles, kAligned>(p, plan.frozen, block);
  } else {
    const Product& product = block < hook ? plan.hook : plan.cues;
    project_rows<TX, TS, kTiles, kAligned>(p, product, block - (block < hook ? frozen : hook));
  }
}

}  // namespace coachhook
