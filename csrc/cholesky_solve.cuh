// Products with few columns, of which the chains that solve with L are made.
#pragma once

#include "cholesky.cuh"

namespace coachhook {

// Where a factor A of a product is zero.
enum class Shape : int { kFull, kLower, kUpper };

// out [m, columns] = base + sign A B, with A [m, k] and B [k, columns]; base is `out` or another
// array, or null for zeros. All but A are contiguous and row-major.
struct NarrowProduct {
  int m = 0;
  int k = 0;
  int columns = 0;
  int sign = 1;
  Shape shape = Shape::kFull;
  const void* a = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
  const void* b = nullptr;
  const void* base = nullptr;
  void* out = nullptr;
};

template <typename T>
struct NarrowTraits {
  static constexpr int kStrips = 2;  // of 16 rows, which find each other's B in the L1 cache
  static constexpr int kSplits = sizeof(T) == 8 ? 8 : 4;  // warps that share the terms of a sum
  static constexpr int kThreads = kStrips * kSplits * kWarpSize;
  // On a multiprocessor, 0 for what the compiler chooses: that spills with float32.
  static constexpr int kBlocks = sizeof(T) == 8 ? 0 : 1;
  static constexpr int kStripRows = 16;
  static constexpr int kRows = kStrips * kStripRows;
  static constexpr int kDepth = 32;  // terms of a warp at a time
  static constexpr int kWidth = 32;  // columns of a block
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kSteps = kDepth / 4;
  static constexpr int kTiles = kWidth / 8;
  static constexpr int kNumbers = 4 * kTiles;  // of a sum in a lane
};

// Each block has 32 rows and 32 columns, each warp every eighth run of 32 terms, with float32 every
// fourth: its addresses take more registers. The sums of the warps are added in pairs.
template <typename T, Layout kLayout>
__global__ void __launch_bounds__(NarrowTraits<T>::kThreads, NarrowTraits<T>::kBlocks)
    narrow_product_kernel(const NarrowProduct p) {
  using Traits = NarrowTraits<T>;
  constexpr int kVector = Traits::kVector, kNumbers = Traits::kNumbers;
  __shared__ T sums[Traits::kStrips * Traits::kSplits / 2 * kNumbers * kWarpSize];

  const int lane = threadIdx.x % kWarpSize, q = lane % 4;
  const int strip = threadIdx.x / kWarpSize % Traits::kStrips;
  const int split = threadIdx.x / kWarpSize / Traits::kStrips;
  const int row0 = blockIdx.x * Traits::kRows + strip * Traits::kStripRows;
  const int column0 = blockIdx.y * Traits::kWidth;
  const int row[2] = {row0 + (kLayout == Layout::kColumns ? lane / 4 * 2 : lane / 4),
                      row0 + (kLayout == Layout::kColumns ? lane / 4 * 2 + 1 : lane / 4 + 8)};
  const bool whole_rows = row0 + Traits::kStripRows <= p.m;
  const int lower_end = row0 + Traits::kStripRows;
  const int end = p.shape == Shape::kLower && lower_end < p.k ? lower_end : p.k;
  const int begin = p.shape == Shape::kUpper ? row0 / Traits::kDepth * Traits::kDepth : 0;

  T sum[2][Traits::kTiles][2] = {};
#pragma unroll 1
  for (int k0 = begin + split * Traits::kDepth; k0 < end; k0 += Traits::kSplits * Traits::kDepth) {
    const int64_t down = opaque(p.row_stride), across = opaque(p.column_stride);
    const T* from = static_cast<const T*>(p.a) + k0 * across;
    const bool whole = whole_rows && k0 + Traits::kDepth <= p.k;
    T a[2][Traits::kSteps];
    if (kLayout == Layout::kRows && whole) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int step = 0; step < Traits::kSteps; step += kVector) {
          const Chunk<T> chunk =
              *reinterpret_cast<const Chunk<T>*>(from + row[h] * down + term<kVector>(step, q));
#pragma unroll
          for (int i = 0; i < kVector; ++i) a[h][step + i] = chunk.value[i];
        }
      }
    } else if (kLayout == Layout::kColumns && whole) {
#pragma unroll
      for (int step = 0; step < Traits::kSteps; ++step) {
        const Pair<T> pair =
            *reinterpret_cast<const Pair<T>*>(from + row[0] + term<kVector>(step, q) * across);
        a[0][step] = pair.value[0];
        a[1][step] = pair.value[1];
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int step = 0; step < Traits::kSteps; ++step) {
          const int k = term<kVector>(step, q);
          const bool inside = row[h] < p.m && k0 + k < p.k;
          a[h][step] = inside ? from[row[h] * down + k * across] : T(0);
        }
      }
    }
    // Terms after the last are zero in A, and take the last row of B.
    const T* b = static_cast<const T*>(p.b) + k0 * p.columns + column0;
    multiply_add<kVector, false, false>(sum, a, b, opaque(p.columns), p.k - 1 - k0);
  }

#pragma unroll 1
  for (int half = Traits::kSplits / 2; half > 0; half /= 2) {
    T* slot = sums + ((split % half) * Traits::kStrips + strip) * kNumbers * kWarpSize + lane;
    T* numbers = &sum[0][0][0];
    if (split >= half && split < 2 * half) {
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) slot[i * kWarpSize] = numbers[i];
    }
    __syncthreads();
    if (split < half) {
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) numbers[i] += slot[i * kWarpSize];
    }
    __syncthreads();
  }
  if (split > 0) return;

  const T sign = static_cast<T>(p.sign);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (row[h] >= p.m) continue;
#pragma unroll
    for (int tile = 0; tile < Traits::kTiles; ++tile) {
      const int at = row[h] * p.columns + column0 + 8 * tile + 2 * q;
      Pair<T> pair = {{T(0), T(0)}};
      if (p.base != nullptr) {
        pair = *reinterpret_cast<const Pair<T>*>(static_cast<const T*>(p.base) + at);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) pair.value[i] += sign * sum[h][tile][i];
      *reinterpret_cast<Pair<T>*>(static_cast<T*>(p.out) + at) = pair;
    }
  }
}

}  // namespace coachhook
