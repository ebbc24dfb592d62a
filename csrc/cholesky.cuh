// Kernels of the rank-k update of a Cholesky factor; cholesky.h has the formulas.
//
//   inverses of diagonal blocks of L: of 64 rows, of twice as many     invert_diagonal_kernel
//                                                                      double_inverses_kernel
//   X = L^-1 K, and L^-T, step by step                                 narrow_product_kernel
//   exclusive prefix sums of the panels' X_j^T X_j                         prefix_sums_kernel
//   G_jj and W_j of every panel, and all that can fail                panel_rotations_kernel
//   L <- L G, each tile read once and written once               apply_rotations_kernel
//
// Every sum has one fixed order, and atomics only count: equal input gives equal bits. A failure
// is a flag on the device that keeps the last kernel from writing.
#pragma once

#include "cholesky_inverse.cuh"
#include "cholesky_panels.cuh"
#include "common/mma_8x8x4.cuh"

namespace coachhook {

// What is known of the layout of L: nothing, or that rows, or columns, are contiguous and aligned
// for wide accesses.
enum class Layout : int { kAny, kRows, kColumns };

template <typename T, int kColumns>
struct ApplyTraits {
  // One block fills a multiprocessor: the more rows share X_j, G_jj and W_j, the less of them is
  // read from the L2 cache. The residuals of 64 keys leave registers for eight warps only.
  static constexpr int kWarps = kColumns == 32 ? 12 : 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kWarpRows = 16;  // two tiles of 8 rows share each operand B
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kSteps = kPanelWidth / 4;  // products of depth 4 across a panel
  static constexpr int kTiles = kPanelWidth / 8;  // tiles of 8 columns
  static constexpr int kKeySteps = kColumns / 4;
  static constexpr int kKeyTiles = kColumns / 8;
  // 2 modulo 16: the rows 2 q of four lanes and 8 neighbouring columns fill the banks evenly.
  static constexpr int kPitch = kPanelWidth + 2;
  static constexpr int kKeyPitch = kColumns + 2;
  // X_j, then G_jj over W_j, in pairs; a thread keeps its share of the next panel's in registers.
  static constexpr unsigned kSolvedPairs = kPanelWidth * kColumns / 2;
  static constexpr unsigned kPairs = kSolvedPairs + (kPanelWidth + kColumns) * kPanelWidth / 2;
  static constexpr unsigned kStaged = kPairs / kThreads;
  static_assert(kPairs % kThreads == 0, "every thread has the same share");

  // Whether pair i, the one numbered `staged` of its thread, is of X_j: known to the compiler for
  // all but one.
  __device__ static constexpr bool is_solved(unsigned staged, unsigned i) {
    return (staged + 1) * kThreads <= kSolvedPairs ||
           (staged * kThreads < kSolvedPairs && i < kSolvedPairs);
  }
  // Where its first number lies in shared memory.
  __device__ static constexpr unsigned place(unsigned staged, unsigned i) {
    constexpr unsigned kHalf = kColumns / 2, kHalfWidth = kPanelWidth / 2;
    if (kColumns == kPanelWidth || is_solved(staged, i))
      return i / kHalf * kKeyPitch + i % kHalf * 2;
    const unsigned j = i - kSolvedPairs;
    return kPanelWidth * kKeyPitch + j / kHalfWidth * kPitch + j % kHalfWidth * 2;
  }
  static_assert(kPanelWidth % kWarpRows == 0, "the rows of a warp lie in one panel");
  static_assert(kRows % kPanelWidth == 0, "the rows of a block are whole panels");
};

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T value[2];
};

// Which of the terms of a sum of 4 kSteps the four lanes of a row hold: in step s, lane q holds
// term kRun (4 (s / kRun) + q) + s % kRun. Runs of two are what a product leaves behind; longer
// ones suit wide loads.
template <int kRun>
__device__ __forceinline__ int term(int step, int q) {
  return kRun * (4 * (step / kRun) + q) + step % kRun;
}

constexpr int kNoLast = 0x7fffffff;

__device__ __forceinline__ int at_most(int value, int limit) {
  return value < limit ? value : limit;
}

// sum [16, 8 kTiles] += A [16, 4 kSteps] B, by one warp. Lane l holds A at two rows, those of l / 4
// in each half of the tile, the terms of lane l % 4, and the sum at these rows, columns
// 8 t + 2 (l % 4) + {0, 1}. With kLower, B is zero above its diagonal, and
// the products of zeros are left out.
template <int kRun, bool kLower, bool kWide, int kSteps, int kTiles>
__device__ __forceinline__ void multiply_add(double (&sum)[2][kTiles][2],
                                             const double (&a)[2][kSteps], const double* b,
                                             int pitch, int last = kNoLast) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int step = 0; step < kSteps; step += 2) {
    const double* first = b + at_most(term<kRun>(step, lane % 4), last) * pitch + lane / 4;
    const double* second = b + at_most(term<kRun>(step + 1, lane % 4), last) * pitch + lane / 4;
    const double left[2][2] = {{a[0][step], a[0][step + 1]}, {a[1][step], a[1][step + 1]}};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (kLower && term<kRun>(step + 1, 3) < 8 * tile) continue;
      const double right[2] = {first[8 * tile], second[8 * tile]};
      if (kWide) {
        mma_16x8x8(sum[0][tile], sum[1][tile], left, right);
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_8x8x4(sum[0][tile], left[0][i], right[i]);
          mma_8x8x4(sum[1][tile], left[1][i], right[i]);
        }
      }
    }
  }
}

// The tensor cores have no product of float32 operands in full: each term is passed around the four
// lanes of its row.
template <int kRun, bool kLower, bool kWide, int kSteps, int kTiles>
__device__ __forceinline__ void multiply_add(float (&sum)[2][kTiles][2],
                                             const float (&a)[2][kSteps], const float* b, int pitch,
                                             int last = kNoLast) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float upper = __shfl_sync(kFullWarp, a[0][step], lane / 4 * 4 + q);
      const float lower = __shfl_sync(kFullWarp, a[1][step], lane / 4 * 4 + q);
      const float* row = b + at_most(term<kRun>(step, q), last) * pitch + 2 * (lane % 4);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (kLower && term<kRun>(step, q) < 8 * tile) continue;
        const Pair<float> pair = *reinterpret_cast<const Pair<float>*>(row + 8 * tile);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sum[0][tile][i] = fmaf(upper, pair.value[i], sum[0][tile][i]);
          sum[1][tile][i] = fmaf(lower, pair.value[i], sum[1][tile][i]);
        }
      }
    }
  }
}

// The same number, of which the compiler knows nothing: what is computed from it is computed where
// it is needed and occupies no registers through a loop.
template <typename T>
__device__ __forceinline__ T opaque(T value) {
#ifndef COACHHOOK_HOST_SHIM
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
#endif
  return value;
}

// A warp's 16 rows of L in a panel of columns that begins at `factor`, as a lane holds them. Where
// `whole`, all of them are below the diagonal and inside the matrix.
template <typename T, int kColumns, Layout kLayout>
__device__ __forceinline__ void load_tile(T (&a)[2][ApplyTraits<T, kColumns>::kSteps],
                                          const T* factor, const ApplyParams& p,
                                          const int (&row)[2], int column0, bool whole) {
  using Traits = ApplyTraits<T, kColumns>;
  constexpr int kVector = Traits::kVector;
  const int q = threadIdx.x % 4;
  const int64_t down = opaque(p.row_stride), across = opaque(p.column_stride);
  if (kLayout == Layout::kRows && whole) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const T* from = factor + row[h] * down;
#pragma unroll
      for (int step = 0; step < Traits::kSteps; step += kVector) {
        const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(from + term<kVector>(step, q));
#pragma unroll
        for (int i = 0; i < kVector; ++i) a[h][step + i] = chunk.value[i];
      }
    }
  } else if (kLayout == Layout::kColumns && whole) {
    const T* from = factor + row[0] + term<kVector>(0, q) * across;
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
      const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(from);
      from = opaque(from + (term<kVector>(step + 1, 0) - term<kVector>(step, 0)) * across);
      a[0][step] = pair.value[0];
      a[1][step] = pair.value[1];
    }
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const T* from = factor + row[h] * down + term<kVector>(0, q) * across;
#pragma unroll
      for (int step = 0; step < Traits::kSteps; ++step) {
        const bool inside = row[h] < p.n && column0 + term<kVector>(step, q) <= row[h];
        a[h][step] = inside ? *from : T(0);
        from = opaque(from + (term<kVector>(step + 1, 0) - term<kVector>(step, 0)) * across);
      }
    }
  }
}

template <typename T, int kColumns, Layout kLayout>
__device__ __forceinline__ void store_tile(const T (&out)[2][ApplyTraits<T, kColumns>::kTiles][2],
                                           T* factor, const ApplyParams& p, const int (&row)[2],
                                           int column0, bool whole) {
  const int first = 2 * (threadIdx.x % 4);
  const int64_t down = opaque(p.row_stride), across = opaque(p.column_stride);
#pragma unroll
  for (int tile = 0; tile < ApplyTraits<T, kColumns>::kTiles; ++tile) {
    const int column = 8 * tile + first;
    if (kLayout == Layout::kRows && whole) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<Pair<T>*>(factor + row[h] * down +
                                    column) = {{out[h][tile][0], out[h][tile][1]}};
      }
    } else if (kLayout == Layout::kColumns && whole) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<Pair<T>*>(factor + row[0] +
                                    (column + i) * across) = {{out[0][tile][i], out[1][tile][i]}};
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (row[h] < p.n && column0 + column + i <= row[h]) {
            factor[row[h] * down + (column + i) * across] = out[h][tile][i];
          }
        }
      }
    }
  }
}

// A block owns some rows of one chunk of columns, a warp 16 of them. The warp reads its tile of a
// panel into registers, and writes it when nobody needs the old one any more. Loads run ahead: of
// X_j, G_jj and W_j by all products of a panel, of L by those with W_j, which do not need it.
template <typename T, int kColumns, Layout kLayout>
__global__ void __launch_bounds__(ApplyTraits<T, kColumns>::kThreads, 1)
    apply_rotations_kernel(const ApplyParams p) {
  using Traits = ApplyTraits<T, kColumns>;
  constexpr int kWidth = kPanelWidth, kThreads = Traits::kThreads;
  constexpr int kPitch = Traits::kPitch, kKeyPitch = Traits::kKeyPitch;
  // -X_j, then G_jj over W_j; for 32 keys all rows have one pitch.
  alignas(16) __shared__ T x[kWidth * kKeyPitch + (kWidth + kColumns) * kPitch];
  T* const g = x + kWidth * kKeyPitch;

  const int lane = threadIdx.x % kWarpSize;
  const int n = static_cast<int>(p.n), chunk_panels = static_cast<int>(p.chunk / kWidth);
  // From the last rows up: they have the most columns, and blocks are started in this order.
  const int block_row = static_cast<int>(gridDim.y - 1 - blockIdx.y) * Traits::kRows;
  const int row0 = block_row + threadIdx.x / kWarpSize * Traits::kWarpRows;
  const int own = row0 / kWidth;  // the panel of the warp's diagonal
  const int rows_end = block_row + Traits::kRows;
  const int lowest = ((rows_end < n ? rows_end : n) - 1) / kWidth;
  const int first = blockIdx.x * chunk_panels;
  const int chunk_end = first + chunk_panels;
  const int end = chunk_end <= lowest ? chunk_end : lowest + 1;
  if (first >= end || *p.status != 0) return;
  // Pairs of two rows arrive in neighbouring registers, as the wide product wants them. To bring
  // others there takes registers that this kernel does not have.
  constexpr bool kWide = kLayout == Layout::kColumns;

  // Two rows that are neighbours in memory share an access.
  const int row[2] = {row0 + (kLayout == Layout::kColumns ? lane / 4 * 2 : lane / 4),
                      row0 + (kLayout == Layout::kColumns ? lane / 4 * 2 + 1 : lane / 4 + 8)};
  const bool full = row0 + Traits::kWarpRows <= n;
  T* factor = static_cast<T*>(p.factor) + int64_t{first} * kWidth * p.column_stride;
  T a[2][Traits::kSteps];
  if (row0 < n && first <= own) {
    load_tile<T, kColumns, kLayout>(a, factor, p, row, first * kWidth, full && first < own);
  }
  Pair<T> staged[Traits::kStaged];
  const auto fetch = [&](int panel) {
    const Pair<T>* solved =
        static_cast<const Pair<T>*>(p.solved) + panel * int64_t{Traits::kSolvedPairs};
    const Pair<T>* rotations = static_cast<const Pair<T>*>(p.rotations) +
                               panel * int64_t{Traits::kPairs - Traits::kSolvedPairs};
#pragma unroll
    for (unsigned s = 0; s < Traits::kStaged; ++s) {
      const unsigned i = s * kThreads + threadIdx.x;
      staged[s] = Traits::is_solved(s, i) ? solved[i] : rotations[i - Traits::kSolvedPairs];
    }
  };
  fetch(first);

  T left[2][Traits::kKeyTiles][2];  // K_i minus what X explains so far
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const T* from = static_cast<const T*>(p.residuals) +
                    (static_cast<int64_t>(blockIdx.x) * p.n + row[h]) * kColumns + 2 * (lane % 4);
#pragma unroll
    for (int tile = 0; tile < Traits::kKeyTiles; ++tile) {
      Pair<T> pair = {{T(0), T(0)}};
      // Rows above the chunk were never in it.
      if (row[h] < n && own >= first) pair = *reinterpret_cast<const Pair<T>*>(from + 8 * tile);
      left[h][tile][0] = pair.value[0];
      left[h][tile][1] = pair.value[1];
    }
  }

  for (int panel = first; panel < end; ++panel, factor += kWidth * p.column_stride) {
    __syncthreads();
#pragma unroll
    for (unsigned s = 0; s < Traits::kStaged; ++s) {
      const unsigned i = s * kThreads + threadIdx.x;
      const T sign = Traits::is_solved(s, i) ? T(-1) : T(1);
      *reinterpret_cast<Pair<T>*>(x + Traits::place(s, i)) = {
          {sign * staged[s].value[0], sign * staged[s].value[1]}};
    }
    __syncthreads();
    if (panel + 1 < end) fetch(panel + 1);
    if (row0 >= n || panel > own) continue;  // the same for the whole warp

    T out[2][Traits::kTiles][2] = {};
    multiply_add<Traits::kVector, true, kWide>(out, a, g, kPitch);
    if (panel < own) {
      multiply_add<Traits::kVector, false, kWide>(left, a, x, kKeyPitch);
      if (panel + 1 < end) {
        load_tile<T, kColumns, kLayout>(a, factor + kWidth * p.column_stride, p, row,
                                        (panel + 1) * kWidth, full && panel + 1 < own);
      }
      T keys[2][Traits::kKeySteps];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int step = 0; step < Traits::kKeySteps; ++step) {
          keys[h][step] = left[h][step / 2][step % 2];
        }
      }
      multiply_add<2, false, false>(out, keys, g + kWidth * kPitch, kPitch);
    }
    store_tile<T, kColumns, kLayout>(out, factor, p, row, panel * kWidth, full && panel < own);
  }
}

}  // namespace coachhook
