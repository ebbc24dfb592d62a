// G_jj and W_j of every panel from X alone, and all that can fail; see cholesky.cuh.
#pragma once

#include <cfloat>
#include <cmath>

#include "cholesky.h"
#include "common/numeric.cuh"

namespace coachhook {

template <typename T>
struct Largest;
template <>
struct Largest<float> {
  static constexpr float kValue = FLT_MAX;
};
template <>
struct Largest<double> {
  static constexpr double kValue = DBL_MAX;
};

template <typename T>
__device__ __forceinline__ bool is_finite(T value) {
  return value >= -Largest<T>::kValue && value <= Largest<T>::kValue;
}

template <typename T>
__device__ __forceinline__ bool is_pivot(T value) {
  return value > T(0) && value <= Largest<T>::kValue;
}

struct PrefixTraits {
  static constexpr int kThreads = 64;
  static constexpr int kBatch = 8;  // loads in flight
};

template <int kColumns>
struct PanelTraits {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlocks = kColumns / kPanelWidth;
  static constexpr int kIdentities = kBlocks;    // blocks of threads after the last panel
  static constexpr bool kPaired = kBlocks == 2;  // panel 1 has two blocks of threads
  // With 34, rows of a block fall into different banks too; 64 keys leave no room for it.
  static constexpr int kPitch = kBlocks == 1 ? kPanelWidth + 2 : kPanelWidth;
  static constexpr int kSize = kPanelWidth * kPitch;
  static_assert(kPanelWidth == kWarpSize, "a lane has a row");
};

// sums [panels + 1, elements]: entry p becomes the sum of those before it.
template <typename T>
__global__ void __launch_bounds__(PrefixTraits::kThreads)
    prefix_sums_kernel(T* sums, int64_t panels, int elements) {
  constexpr int kBatch = PrefixTraits::kBatch;
  const int element = blockIdx.x * PrefixTraits::kThreads + threadIdx.x;
  if (element >= elements) return;
  T* at = sums + element;
  T total = T(0);
  for (int64_t first = 0; first < panels; first += kBatch) {
    T values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      values[i] = first + i < panels ? at[(first + i) * elements] : T(0);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < panels) at[(first + i) * elements] = total;
      total += values[i];
    }
  }
  at[panels * elements] = total;
}

template <typename T>
__device__ __forceinline__ T inverse_root(T value) {
  return T(1) / sqrt(value);
}
#ifndef COACHHOOK_HOST_SHIM
// Half the latency of a root and a division, which every step below waits for.
template <>
__device__ __forceinline__ double inverse_root(double value) {
  return rsqrt(value);
}
#endif

// What follows is done by one warp, on rows of 32 numbers: a lane holds one. The steps are loops
// over registers that move by one place, so that few instructions are fetched for them.

// Cholesky factor R of a symmetric matrix: a lane holds its row, of which the part left of the
// diagonal is looked at, and the diagonal entry. Column c of R goes to `root` + c kPitch, from its
// diagonal down, with zeros after its end and the inverse in place of the diagonal entry. `root`
// may be where the rows were read from: what the first step overwrites only the lane itself has
// read. A pivot that is not positive and finite sets `failed` and counts as 1.
template <int kPitch, typename T>
__device__ __forceinline__ void factor_rows(T (&row)[kPanelWidth], T diagonal, T* root,
                                            int32_t* failed) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int c = 0; c < kPanelWidth; ++c, root += kPitch) {
    T pivot = __shfl_sync(kFullWarp, diagonal, c);
    if (!is_pivot(pivot)) {
      if (lane == 0) *failed = 1;
      pivot = T(1);
    }
    const T inverse = inverse_root(pivot);
    const T entry = lane > c ? row[0] * inverse : T(0);
    root[(lane - c) & (kPanelWidth - 1)] = lane == c ? inverse : entry;
    // The next pivot waits for this, but not for what the other lanes have written.
    diagonal -= entry * entry;
    __syncwarp();
#pragma unroll
    for (int i = 1; i < kPanelWidth; ++i) row[i - 1] = row[i] - entry * root[i];
  }
}

// row R^-T, for R as above; entry c goes to `out` + c stride.
template <int kPitch, typename T>
__device__ __forceinline__ void substitute(T (&row)[kPanelWidth], const T* root, T* out,
                                           int stride) {
#pragma unroll 1
  for (int c = 0; c < kPanelWidth; ++c, root += kPitch) {
    const T value = row[0] * root[0];
    out[c * stride] = value;
#pragma unroll
    for (int i = 1; i < kPanelWidth; ++i) row[i - 1] = row[i] - value * root[i];
  }
}

// row R^-1, likewise. Places of `row` that have run out take up to a block of numbers in front of
// R, whatever these are.
template <int kPitch, typename T>
__device__ __forceinline__ void substitute_back(T (&row)[kPanelWidth], const T* root, T* out,
                                                int stride) {
#pragma unroll 1
  for (int c = kPanelWidth - 1; c >= 0; --c) {
    const T value = row[kPanelWidth - 1] * root[c * kPitch];
    out[c * stride] = value;
    // Entry i is of column i - (31 - c) now; row c of R is at that column's place 31 - i.
    const T* from = root - (kPanelWidth - 1 - c) * kPitch + kPanelWidth - 1;
#pragma unroll
    for (int i = kPanelWidth - 2; i >= 0; --i) row[i + 1] = row[i] - value * from[i * (kPitch - 1)];
  }
}

// row -= other B, where entry c of `other` is at c kPitch and B [c][q] at c down + q across.
template <int kPitch, typename T>
__device__ __forceinline__ void subtract_product(T (&row)[kPanelWidth], const T* other, const T* b,
                                                 int down, int across) {
#pragma unroll 1
  for (int c = 0; c < kPanelWidth; ++c) {
    const T value = other[c * kPitch];
#pragma unroll
    for (int q = 0; q < kPanelWidth; ++q) row[q] -= value * b[c * down + q * across];
  }
}

template <typename T>
__device__ __forceinline__ void load_row(T (&row)[kPanelWidth], const T* from, int stride) {
#pragma unroll
  for (int c = 0; c < kPanelWidth; ++c) row[c] = from[c * stride];
}

// One block for each panel; then kColumns / 32 blocks that factor (1 - margin) I + s X^T X, each of
// them solving for 32 rows of its inverse. All of it is a chain of dependent steps, so a warp takes
// each of them without barriers.
//
// P of panel 1 is of 32 rows of X, so with more keys it is singular, and where they outweigh L L^T
// the I of I + P drowns in its rounding. (I - P of a downdate has no such trouble, but the same
// form.) There the first 64 rows Z of X are taken as one panel would be: the second blocks of
// chol(I + s Z Z^T) and of its solution for Z are G_11 and s W_1^T. It has two blocks of threads,
// the last of all for the keys from 32 on.
template <typename T, int kColumns>
__global__ void __launch_bounds__(PanelTraits<kColumns>::kThreads)
    panel_rotations_kernel(const RotationParams p) {
  using Traits = PanelTraits<kColumns>;
  constexpr int kThreads = Traits::kThreads, kPitch = Traits::kPitch, kSize = Traits::kSize;
  constexpr int kWidth = kPanelWidth, kBlocks = Traits::kBlocks;
  // Blocks of 32 x 32 by columns: G_jj, which comes first for substitute_back; R in its lower
  // triangle of blocks; X_j, then Y^T, then W^T.
  alignas(16) __shared__ T corner[(1 + kBlocks * (kBlocks + 1) / 2 + kBlocks) * kSize];
  const auto root = [&](int d, int e) { return corner + (1 + d * (d + 1) / 2 + e) * kSize; };
  T* const rows = root(kBlocks, 0);

  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t panels = (p.n + kWidth - 1) / kWidth;
  const int64_t second = panels + Traits::kIdentities;  // block of threads of panel 1
  const bool is_pair = Traits::kPaired && panels > 1 && (blockIdx.x == 1 || blockIdx.x == second);
  const bool is_panel = blockIdx.x < panels && !is_pair;
  const bool is_identity = !is_panel && !is_pair;
  const int64_t panel = is_pair ? 1 : blockIdx.x;
  // Which 32 rows of the inverse, or which 32 keys.
  const int part = is_pair ? blockIdx.x == second : static_cast<int>(panel - panels);
  const T sign = static_cast<T>(p.sign);
  const T diagonal = static_cast<T>(is_identity ? 1.0 - p.margin : 1.0);

  bool good = true;
  const int64_t entry = is_panel ? panel : panels + is_pair;
  const T* sums = static_cast<const T*>(p.sums) + entry * static_cast<int64_t>(kColumns * kColumns);
#pragma unroll
  for (int d = 0; d < kBlocks; ++d) {
#pragma unroll
    for (int e = 0; e <= d; ++e) {
#pragma unroll 8
      for (int c = warp; c < kWidth; c += Traits::kWarps) {
        const T sum = sums[(e * kWidth + c) * kColumns + d * kWidth + lane];
        root(d, e)[c * kPitch + lane] = (d == e && c == lane ? diagonal : T(0)) + sign * sum;
      }
    }
  }
  const T* solved = static_cast<const T*>(p.solved) + (is_pair ? 0 : panel * kWidth * kColumns);
#pragma unroll 8
  for (int i = threadIdx.x; i < kWidth * kColumns; i += kThreads) {
    const int r = is_pair ? i % kWidth : i / kColumns, c = is_pair ? i / kWidth : i % kColumns;
    T value;
    if (is_identity) {
      value = c == part * kWidth + r ? T(1) : T(0);
    } else {
      // Rows of X, or of its transpose.
      value = solved[is_pair ? c * kColumns + part * kWidth + r : i];
      good = good && is_finite(value);
    }
    rows[c * kPitch + r] = value;
  }
  if (!is_identity && threadIdx.x < kWidth) {
    const int64_t i = panel * kWidth + threadIdx.x;
    if (i < p.n) good = good && is_pivot(static_cast<const T*>(p.factor)[i * p.diagonal_stride]);
  }
  __syncthreads();

  T row[kWidth];
#pragma unroll
  for (int d = 0; d < kBlocks; ++d) {
    if (warp == 0) {
      load_row(row, root(d, d) + lane, kPitch);
      factor_rows<kPitch>(row, root(d, d)[lane * kPitch + lane], root(d, d), p.status);
    }
    __syncthreads();
    // The blocks below: the next of R with the first warps, X_j with the last.
    if (warp < kBlocks - d) {
      T* block = (warp == kBlocks - d - 1 ? rows + d * kSize : root(d + 1 + warp, d)) + lane;
      load_row(row, block, kPitch);
      substitute<kPitch>(row, root(d, d), block, kPitch);
    }
    __syncthreads();
    if (d + 1 < kBlocks && warp < 2) {
      // What the first warp changes it factors next, the same rows with the same lanes.
      static_assert(kBlocks <= 2, "one block to the right");
      const T* left = (warp == 0 ? root(1, 0) : rows) + lane;
      T* block = (warp == 0 ? root(1, 1) : rows + kSize) + lane;
      load_row(row, block, kPitch);
      subtract_product<kPitch>(row, left, root(1, 0), kPitch, 1);
#pragma unroll
      for (int q = 0; q < kWidth; ++q) block[q * kPitch] = row[q];
    }
  }

  T* rotations = static_cast<T*>(p.rotations) + panel * (kWidth + kColumns) * kWidth;
  // Row r of G_jj, from its columns.
  const auto store_corner = [&](const T* from, int r) {
    T value = lane <= r ? from[lane * (kPitch - 1) + r] : T(0);
    if (lane == r) value = T(1) / value;
    good = good && is_finite(value);
    rotations[r * kWidth + lane] = value;
  };
  if (is_pair) {
    for (int r = warp; r < kWidth; r += Traits::kWarps) {
      if (part == 0) store_corner(root(1, 1), r);
      const T value = rows[kSize + lane * kPitch + r];
      good = good && is_finite(value);
      rotations[(kWidth + part * kWidth + r) * kWidth + lane] = sign * value;
    }
    if (!good) p.status[0] = 1;
    return;
  }
  if (is_panel) {
    constexpr int kShare = kWidth / Traits::kWarps;
    T sum[kShare] = {};
#pragma unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const T value = rows[c * kPitch + lane];
#pragma unroll
      for (int q = 0; q < kShare; ++q) sum[q] += value * rows[c * kPitch + warp * kShare + q];
    }
#pragma unroll
    for (int q = 0; q < kShare; ++q) {
      const int column = warp * kShare + q;
      corner[column * kPitch + lane] = (column == lane ? T(1) : T(0)) + sign * sum[q];
    }
    __syncthreads();
    if (warp == 0) {
      load_row(row, corner + lane, kPitch);
      factor_rows<kPitch>(row, corner[lane * kPitch + lane], corner, p.status);
    }
    __syncthreads();
    // Rows of Y: those of `rows` by columns.
    if (warp < kBlocks) {
      T* own = rows + warp * kSize + lane * kPitch;
      load_row(row, own, 1);
      substitute<kPitch>(row, corner, own, 1);
    }
    __syncthreads();
  } else if (threadIdx.x == 0) {
    T least = *root(0, 0), most = least;
    for (int c = 1; c < static_cast<int>(p.keys); ++c) {
      const T inverse = root(c / kWidth, c / kWidth)[c % kWidth * kPitch];
      least = inverse < least ? inverse : least;
      most = inverse > most ? inverse : most;
    }
    if (!(most * most <= static_cast<T>(p.pivot_limit) * least * least)) p.status[1] = 1;
  }

  if (warp == 0) {
    if (kBlocks == 2) {
      T* own = rows + kSize + lane;
      load_row(row, own, kPitch);
      substitute_back<kPitch>(row, root(1, 1), own, kPitch);
      load_row(row, rows + lane, kPitch);
      subtract_product<kPitch>(row, own, root(1, 0), 1, kPitch);
    } else {
      load_row(row, rows + lane, kPitch);
    }
    substitute_back<kPitch>(row, root(0, 0), rows + lane, kPitch);
    for (int c = 0; c < kColumns; ++c) {
      const T value = rows[c * kPitch + lane];
      if (is_panel) {
        good = good && is_finite(value);
        rotations[(kWidth + c) * kWidth + lane] = sign * value;
      } else if (p.inverse != nullptr) {
        static_cast<T*>(p.inverse)[(part * kWidth + lane) * kColumns + c] = value;
      }
    }
  } else if (is_panel) {
    for (int r = warp - 1; r < kWidth; r += Traits::kWarps - 1) store_corner(corner, r);
  }
  if (!good) p.status[0] = 1;
}

}  // namespace coachhook
