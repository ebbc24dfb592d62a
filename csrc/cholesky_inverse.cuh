// Inverses of small diagonal blocks of L, from which larger ones are made by products.
#pragma once

#include "cholesky_panels.cuh"

namespace coachhook {

struct InverseTraits {
  static constexpr int kWarps = 2;  // each inverts half of the diagonal
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kPitch = kPanelWidth + 2;  // rows and columns fall into different banks
  static constexpr int kSize = kPanelWidth * kPitch;
  static_assert(kInverseWidth == kWarps * kPanelWidth, "a row for each lane");
};

// blockIdx.x is a diagonal block of 64 rows. blockIdx.y is 0 to invert it, else how many blocks of
// 64 columns to the right of it there is one to fill with zeros.
template <typename T>
__global__ void __launch_bounds__(InverseTraits::kThreads)
    invert_diagonal_kernel(const InverseParams p) {
  constexpr int kWidth = kPanelWidth, kPitch = InverseTraits::kPitch, kSize = InverseTraits::kSize;
  // The corner below the diagonal, then its product; the halves of L; their inverses; by columns.
  alignas(16) __shared__ T corner[5 * kSize];
  T* const halves = corner + kSize;
  T* const inverted = halves + 2 * kSize;

  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kInverseWidth;
  const int64_t column = first % p.rows + static_cast<int64_t>(blockIdx.y) * kInverseWidth;
  if (column >= p.rows) return;
  T* out = static_cast<T*>(p.inverses) + first * (p.rows + 1) +
           static_cast<int64_t>(blockIdx.y) * kInverseWidth;
  if (blockIdx.y > 0) {
    for (int r = 0; r < kInverseWidth; ++r) out[r * p.rows + threadIdx.x] = T(0);
    return;
  }

  if (threadIdx.x < kArrivals) {
    p.arrivals[blockIdx.x * kArrivals + threadIdx.x] = 0;
  }
  const T* factor = static_cast<const T*>(p.factor);
  const auto load = [&](int64_t row, int64_t column) {
    if (row >= p.n) return row == column ? T(1) : T(0);
    return factor[row * p.row_stride + column * p.column_stride];
  };
  const int64_t top = first + warp * kWidth;
  T row[kWidth];
#pragma unroll
  for (int c = 0; c < kWidth; ++c) row[c] = c <= lane ? load(top + lane, top + c) : T(0);
#pragma unroll 8
  for (int c = warp; c < kWidth; c += InverseTraits::kWarps) {
    corner[c * kPitch + lane] = load(first + kWidth + lane, first + c);
  }
  T* half = halves + warp * kSize;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    half[c * kPitch + ((lane - c) & (kWidth - 1))] = lane == c ? T(1) / row[c] : row[c];
  }
  // Of the block, not of the warp: numbers in front of a half are read too, and come to nothing.
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kWidth; ++c) row[c] = lane == c ? T(1) : T(0);
  substitute_back<kPitch>(row, half, inverted + warp * kSize + lane, kPitch);
  __syncthreads();

  if (warp == 0) {
    for (int r = 0; r < kWidth; ++r) {
      out[r * p.rows + lane] = inverted[lane * kPitch + r];
      out[r * p.rows + kWidth + lane] = T(0);
      out[(kWidth + r) * p.rows + kWidth + lane] = inverted[kSize + lane * kPitch + r];
    }
    return;
  }
  // -C^-1 (B A^-1) for the corner B between A and C.
#pragma unroll
  for (int c = 0; c < kWidth; ++c) row[c] = T(0);
  subtract_product<kPitch>(row, corner + lane, inverted, 1, kPitch);
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    corner[c * kPitch + lane] = row[c];
    row[c] = T(0);
  }
  __syncwarp();
  subtract_product<kPitch>(row, inverted + kSize + lane, corner, 1, kPitch);
  __syncwarp();
#pragma unroll
  for (int c = 0; c < kWidth; ++c) corner[c * kPitch + lane] = -row[c];
  __syncwarp();
  for (int r = 0; r < kWidth; ++r) out[(kWidth + r) * p.rows + lane] = corner[lane * kPitch + r];
}

}  // namespace coachhook
