// The first launch of decoding: [P; f] = [W0; S] x, and with cues [P; f; c], in slices of the
// depth.
//
// Which lane adds which terms, and when, follows from the sizes of the matrices, never from the
// tokens: a token has the same bits alone and in any batch.
#pragma once

#include <type_traits>

#include "common/copy_async.cuh"
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
  int64_t sequence_length = 0;  // tokens, where all sequences have as many
};

// Blocks take 8 kTiles tokens. Warps of a block take different steps of the same slice, 16 rows
// each, and their sums meet in shared memory: many reads in flight, few slices.
template <int kTiles>
struct ProjectTraits {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kWarpRows = 16;
  // Steps of a warp under way. Three fill the shared memory that needs no asking for: 48 KiB a
  // block, where a multiprocessor's share of the bandwidth is some 32 KiB each microsecond.
  static constexpr int kAhead = 3;
  // Blocks per multiprocessor.
  static constexpr int kBlocks = kTiles == 1 ? 3 : 1;
  static constexpr int kTokens = 8 * kTiles;
  static_assert(kTokens <= kDecodeTokens, "tiles of 8 tokens");
};

struct StepTraits {
  static constexpr int kGroups = 2;  // 16-byte reads of a lane per row and step
  // Warps that share rows. Those of a tall matrix leave some of x to each other in L1.
  static constexpr int kDepthWarps = 4;
  static constexpr int kDepthWarpsShort = 8;
  template <typename T>
  static constexpr int kDepth = kGroups * 4 * Chunk<T>::kSize;  // terms per step
};

// 16 bytes in the registers of a fragment.
struct alignas(16) Words {
  uint32_t word[4];
};

// Steps on their way, by warp. What a lane copies, only this lane reads: there is no barrier.
template <int kTiles>
using Ring = Words[ProjectTraits<kTiles>::kWarps][ProjectTraits<kTiles>::kAhead]
                  [2 * StepTraits::kGroups][kWarpSize];

template <typename T>
__device__ __forceinline__ uint32_t bits_of(T value) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(value);
  } else {
    return *reinterpret_cast<const uint16_t*>(&value);
  }
}

template <typename T>
__device__ __forceinline__ T of_bits(uint32_t bits) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(bits);
  } else {
    const uint16_t half = static_cast<uint16_t>(bits);
    return *reinterpret_cast<const T*>(&half);
  }
}

// Elements [start, start + 16 bytes) of a row, zero from `end` on. Alignment chooses how they are
// read, not what; an aligned row ends between two reads.
template <typename T, bool kAligned>
__device__ __forceinline__ Words load_words(const T* row, int start, int end) {
  constexpr int kSize = Chunk<T>::kSize;
  Words words = {{0u, 0u, 0u, 0u}};
  if constexpr (kAligned) {
    if (start < end) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(row + start));
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

// Four 16-bit terms of x, beside four of a float32 matrix.
struct alignas(8) HalfWords {
  uint32_t word[2];
};

// Terms of x beside a 16-byte read of a matrix of TW, as they lie in memory: to touch them would be
// to wait for them.
template <typename TX, typename TW>
using Terms = std::conditional_t<sizeof(TX) == sizeof(TW), Words, HalfWords>;

template <typename TX, typename TW, bool kAligned>
__device__ __forceinline__ Terms<TX, TW> load_tokens(const TX* row, int start, int end) {
  if constexpr (sizeof(TX) == sizeof(TW)) {
    return load_words<TX, kAligned>(row, start, end);
  } else {
    HalfWords words = {{0u, 0u}};
    if constexpr (kAligned) {
      if (start < end) words = *reinterpret_cast<const HalfWords*>(row + start);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (start + i < end) words.word[i / 2] |= bits_of(row[start + i]) << (i % 2 * 16);
      }
    }
    return words;
  }
}

// 16-bit terms as float32, exactly.
template <typename TX>
__device__ __forceinline__ Words widened(const HalfWords& half) {
  Words words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words.word[i] = __float_as_uint(to_float(of_bits<TX>(half.word[i / 2] >> (i % 2 * 16))));
  }
  return words;
}
template <typename TX>
__device__ __forceinline__ Words widened(const Words& words) {
  return words;
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
                                             unsigned block, Ring<kTiles>& ring) {
  using Traits = ProjectTraits<kTiles>;
  constexpr int kAhead = Traits::kAhead, kGroups = StepTraits::kGroups;
  constexpr int kSize = Chunk<TW>::kSize, kStep = StepTraits::kDepth<TW>;
  static_assert(kGroups == 2, "two sets of terms take turns");
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int row_warps = Traits::kWarps / product.depth_warps;
  const int depth_warp = warp / row_warps, row_warp = warp % row_warps;
  const unsigned split = block / static_cast<unsigned>(product.tiles);
  const unsigned tile_of_rows = block - split * static_cast<unsigned>(product.tiles);
  const int64_t first_row =
      (static_cast<int64_t>(tile_of_rows) * row_warps + row_warp) * Traits::kWarpRows;
  const int64_t begin = split * product.slice;
  const int end =
      static_cast<int>(product.slice < p.depth - begin ? product.slice : p.depth - begin);
  const int stride = product.depth_warps * kStep;
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * Traits::kTokens;
  const int tokens = static_cast<int>(p.gate.rows - first_token);  // may be more than this block's
  const TX* x = static_cast<const TX*>(p.x) + first_token * p.x_row_stride + begin;
  const TX* x_row = x + g * p.x_row_stride;
  const int64_t x_tile = 8 * p.x_row_stride;
  const TW* matrix = static_cast<const TW*>(product.matrix) + begin;
  const TW* rows[2];
  int stop[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + half * 8 + g;
    rows[half] = matrix + row * product.row_stride;
    // A row past the last reads nothing and counts as zero.
    stop[half] = row < product.rows ? end : 0;
  }

  const auto fetch = [&](int slot, int k) {
    if (k < end) {
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) {
        const int half = i / kGroups, start = k + (i % kGroups * 4 + t) * kSize;
        Words* to = &ring[warp][slot][i][lane];
        if constexpr (kAligned) {
          copy_async(to, rows[half] + start, start < stop[half]);
        } else {
          *to = load_words<TW, false>(rows[half], start, stop[half]);
        }
      }
    }
    close_copies();
  };
  const auto load = [&](Terms<TX, TW>(&terms)[kTiles], int k, int group) {
    const int start = k + (group * 4 + t) * kSize;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile * 8 >= tokens) break;
      const int stop_here = tile * 8 + g < tokens ? end : 0;
      terms[tile] = load_tokens<TX, TW, kAligned>(x_row + tile * x_tile, start, stop_here);
    }
  };
  float sum[kTiles][4] = {};
  const auto add = [&](const Terms<TX, TW>(&terms)[kTiles], int slot, int group) {
    const Rows<TW> read(ring[warp][slot][group][lane], ring[warp][slot][kGroups + group][lane]);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile * 8 >= tokens) break;
      multiply<TX, TW>(sum[tile], read, widened<TX>(terms[tile]));
    }
  };

  int k = depth_warp * kStep;
#pragma unroll
  for (int slot = 0; slot < kAhead; ++slot) fetch(slot, k + slot * stride);
  // The terms of a group are on their way while the group before them is multiplied.
  Terms<TX, TW> even[kTiles], odd[kTiles];
  load(even, k, 0);
  for (int slot = 0; k < end; k += stride) {
    load(odd, k, 1);
    wait_for_copies<kAhead - 1>();
    add(even, slot, 0);
    load(even, k + stride, 0);
    add(odd, slot, 1);
    fetch(slot, k + kAhead * stride);
    slot = slot + 1 == kAhead ? 0 : slot + 1;
  }

  // Sums take the place of the steps: each lane's own, which nobody else reads before the barrier.
  static_assert(kTiles <= kAhead * 2 * kGroups, "room for the sums of a lane");
  Words* mine = &ring[warp][0][0][lane];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile * 8 >= tokens) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mine[tile * kWarpSize].word[i] = __float_as_uint(sum[tile][i]);
    }
  }
  __syncthreads();
  for (int tile = depth_warp; tile < kTiles; tile += product.depth_warps) {
    if (tile * 8 >= tokens) break;
    float total[4] = {};
    for (int d = 0; d < product.depth_warps; ++d) {
      const Words other = (&ring[d * row_warps + row_warp][0][0][lane])[tile * kWarpSize];
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] += __uint_as_float(other.word[i]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first_row + i / 2 * 8 + g;
      const int token = tile * 8 + 2 * t + i % 2;
      if (row < product.rows && token < tokens) {
        product.part[(split * p.gate.rows + first_token + token) * product.pitch + row] = total[i];
      }
    }
  }
}

template <typename TX, typename TS, int kTiles, bool kAligned>
__global__ void __launch_bounds__(ProjectTraits<kTiles>::kThreads, ProjectTraits<kTiles>::kBlocks)
    decode_project_kernel(const DecodeParams p, const DecodePlan plan) {
  __shared__ Ring<kTiles> ring;
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
    project_rows<TX, TS, kTiles, kAligned>(p, product, static_cast<unsigned>(block - before), ring);
  } else if (block < frozen) {
    project_rows<TX, TX, kTiles, kAligned>(p, plan.frozen, static_cast<unsigned>(block), ring);
  } else {
    const Product& product = block < hook ? plan.hook : plan.cues;
    project_rows<TX, TS, kTiles, kAligned>(
        p, product, static_cast<unsigned>(block - (block < hook ? frozen : hook)), ring);
  }
}

}  // namespace coachhook
