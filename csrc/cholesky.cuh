// Kernels of the rank-k update of a Cholesky factor; cholesky.h has the formulas.
//
//   exclusive prefix sums of the panels' X_j^T X_j                         prefix_sums_kernel
//   G_jj and W_j of every panel, and all that can fail                panel_rotations_kernel
//   L <- L G, each tile read once and written once               apply_rotations_kernel
//
// Every sum has one fixed order and there are no atomics: equal input gives equal bits. A failure
// is a flag on the device that keeps the last kernel from writing.
#pragma once

#include <cfloat>
#include <cmath>

#include "cholesky.h"
#include "common/mma_8x8x4.cuh"
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
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kPitch = kColumns + 1;  // odd: columns of rows fall into different banks
  static constexpr int kIdentities = kColumns / kPanelWidth;  // blocks after the last panel
  static_assert(kColumns == 32 || kColumns == 64, "whole warps of columns");
};

template <typename T, int kColumns>
struct ApplyTraits {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kWarpRows = 16;  // two tiles of 8 rows share each operand B
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kBlocks = 2;  // on a multiprocessor; with more, some architecture spills
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kSteps = kPanelWidth / 4;  // products of depth 4 across a panel
  static constexpr int kTiles = kPanelWidth / 8;  // tiles of 8 columns
  static constexpr int kKeySteps = kColumns / 4;
  static constexpr int kKeyTiles = kColumns / 8;
  // 2 modulo 16: the rows 2 q of four lanes and 8 neighbouring columns fill the banks evenly.
  static constexpr int kPitch = kPanelWidth + 2;
  static constexpr int kKeyPitch = kColumns + 2;
  static_assert(kPanelWidth % kWarpRows == 0, "the rows of a warp lie in one panel");
  static_assert(kRows % kPanelWidth == 0, "the rows of a block are whole panels");
};

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T value[2];
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

__device__ __forceinline__ int packed_row(int row) { return row * (row + 1) / 2; }

// Cholesky factor of a symmetric matrix of kSize rows with `rows` further rows below it, which
// become rows R^-T; all by the threads of a block. The matrix is a packed lower triangle; the
// further rows have any strides. `roots` receives the inverse diagonal of the factor. A pivot that
// is not positive and finite sets `failed` and counts as 1.
template <typename T, int kSize, int kWarps>
__device__ __forceinline__ void eliminate(T* triangle, T* below, int rows, int row_stride,
                                          int column_stride, T* roots, int32_t* failed) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  for (int c = 0; c < kSize; ++c) {
    T pivot = triangle[packed_row(c) + c];
    if (!is_pivot(pivot)) {
      if (threadIdx.x == 0) *failed = 1;
      pivot = T(1);
    }
    if (threadIdx.x == 0) roots[c] = T(1) / sqrt(pivot);
    const T inverse = T(1) / pivot;
    for (int r = c + 1 + warp; r < kSize + rows; r += kWarps) {
      const bool inside = r < kSize;
      T* row = inside ? triangle + packed_row(r) : below + (r - kSize) * row_stride;
      const int stride = inside ? 1 : column_stride;
      const int last = inside ? r : kSize - 1;
      const T scaled = row[c * stride] * inverse;
      for (int q = c + 1 + lane; q <= last; q += kWarpSize) {
        row[q * stride] -= scaled * triangle[packed_row(q) + c];
      }
    }
    __syncthreads();
  }
  for (int r = warp; r < kSize + rows; r += kWarps) {
    const bool inside = r < kSize;
    T* row = inside ? triangle + packed_row(r) : below + (r - kSize) * row_stride;
    const int stride = inside ? 1 : column_stride;
    const int last = inside ? r : kSize - 1;
    for (int q = lane; q <= last; q += kWarpSize) row[q * stride] *= roots[q];
  }
  __syncthreads();
}

// One block for each panel; then kColumns / 32 blocks that factor (1 - margin) I + s X^T X, each of
// them solving for 32 rows of its inverse.
template <typename T, int kColumns>
__global__ void __launch_bounds__(PanelTraits<kColumns>::kThreads)
    panel_rotations_kernel(const RotationParams p) {
  using Traits = PanelTraits<kColumns>;
  constexpr int kThreads = Traits::kThreads, kWarps = Traits::kWarps, kPitch = Traits::kPitch;
  constexpr int kWidth = kPanelWidth;
  __shared__ T root[kColumns * (kColumns + 1) / 2];
  __shared__ T rows[kWidth * kPitch];  // X_j, then Y^T, then W^T
  __shared__ T corner[kWidth * (kWidth + 1) / 2];
  __shared__ T roots[kColumns], corner_roots[kWidth];

  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t panels = (p.n + kWidth - 1) / kWidth;
  const int64_t panel = blockIdx.x;
  const bool is_panel = panel < panels;
  const T sign = static_cast<T>(p.sign);
  const T diagonal = static_cast<T>(is_panel ? 1.0 : 1.0 - p.margin);

  const T* sums = static_cast<const T*>(p.sums) +
                  (is_panel ? panel : panels) * static_cast<int64_t>(kColumns * kColumns);
  for (int r = warp; r < kColumns; r += kWarps) {
    for (int q = lane; q <= r; q += kWarpSize) {
      root[packed_row(r) + q] = (q == r ? diagonal : T(0)) + sign * sums[r * kColumns + q];
    }
  }
  bool good = true;
  const T* solved = static_cast<const T*>(p.solved) + panel * kWidth * kColumns;
  for (int i = threadIdx.x; i < kWidth * kColumns; i += kThreads) {
    const int r = i / kColumns, c = i % kColumns;
    T value;
    if (is_panel) {
      value = solved[i];
      good = good && is_finite(value);
    } else {
      value = c == static_cast<int>(panel - panels) * kWidth + r ? T(1) : T(0);
    }
    rows[r * kPitch + c] = value;
  }
  if (is_panel && threadIdx.x < kWidth) {
    const int64_t i = panel * kWidth + threadIdx.x;
    if (i < p.n) good = good && is_pivot(static_cast<const T*>(p.factor)[i * p.diagonal_stride]);
  }
  __syncthreads();

  eliminate<T, kColumns, kWarps>(root, rows, kWidth, kPitch, 1, roots, p.status);

  if (is_panel) {
    for (int r = warp; r < kWidth; r += kWarps) {
      if (lane > r) continue;
      T sum = T(0);
      for (int c = 0; c < kColumns; ++c) sum += rows[r * kPitch + c] * rows[lane * kPitch + c];
      corner[packed_row(r) + lane] = (lane == r ? T(1) : T(0)) + sign * sum;
    }
    __syncthreads();
    // The further rows are those of Y: the same array, transposed.
    eliminate<T, kWidth, kWarps>(corner, rows, kColumns, 1, kPitch, corner_roots, p.status);
  } else if (threadIdx.x == 0) {
    T least = roots[0], most = roots[0];
    for (int c = 1; c < static_cast<int>(p.keys); ++c) {
      least = roots[c] < least ? roots[c] : least;
      most = roots[c] > most ? roots[c] : most;
    }
    if (!(most * most <= static_cast<T>(p.pivot_limit) * least * least)) p.status[1] = 1;
  }

  // R^T from the right, a row of `rows` in a warp: no other warp touches it.
  for (int r = warp; r < kWidth; r += kWarps) {
    T* row = rows + r * kPitch;
    for (int c = kColumns - 1; c >= 0; --c) {
      const T value = row[c] * roots[c];
      __syncwarp();
      for (int q = lane; q <= c; q += kWarpSize) {
        if (q < c) {
          row[q] -= root[packed_row(c) + q] * value;
        } else {
          row[q] = value;
        }
      }
      __syncwarp();
    }
  }
  __syncthreads();

  if (is_panel) {
    T* out = static_cast<T*>(p.rotations) + panel * (kWidth + kColumns) * kWidth;
    for (int i = threadIdx.x; i < (kWidth + kColumns) * kWidth; i += kThreads) {
      const int r = i / kWidth, c = i % kWidth;
      T value = T(0);
      if (r >= kWidth) {
        value = sign * rows[c * kPitch + r - kWidth];
      } else if (c <= r) {
        value = corner[packed_row(r) + c];
      }
      good = good && is_finite(value);
      out[i] = value;
    }
  } else if (p.inverse != nullptr) {
    T* out = static_cast<T*>(p.inverse) + (panel - panels) * kWidth * kColumns;
    for (int i = threadIdx.x; i < kWidth * kColumns; i += kThreads) {
      out[i] = rows[i / kColumns * kPitch + i % kColumns];
    }
  }
  if (!good) p.status[0] = 1;
}

// Which of the terms of a sum of 4 kSteps the four lanes of a row hold: in step s, lane q holds
// term kRun (4 (s / kRun) + q) + s % kRun. Runs of two are what a product leaves behind; longer
// ones suit wide loads.
template <int kRun>
__device__ __forceinline__ int term(int step, int q) {
  return kRun * (4 * (step / kRun) + q) + step % kRun;
}

// sum [16, 8 kTiles] += A [16, 4 kSteps] B, by one warp. Lane l holds A at rows l / 4 and
// l / 4 + 8, the terms of lane l % 4, and the sum at these rows, columns 8 t + 2 (l % 4) + {0, 1}.
// B is in shared memory.
template <int kRun, int kSteps, int kTiles>
__device__ __forceinline__ void multiply_add(double (&sum)[2][kTiles][2],
                                             const double (&a)[2][kSteps], const double* b,
                                             int pitch) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const double* row = b + term<kRun>(step, lane % 4) * pitch + lane / 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const double value = row[8 * tile];
      mma_8x8x4(sum[0][tile], a[0][step], value);
      mma_8x8x4(sum[1][tile], a[1][step], value);
    }
  }
}

// The tensor cores have no product of float32 operands in full: each term is passed around the four
// lanes of its row.
template <int kRun, int kSteps, int kTiles>
__device__ __forceinline__ void multiply_add(float (&sum)[2][kTiles][2],
                                             const float (&a)[2][kSteps], const float* b,
                                             int pitch) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float upper = __shfl_sync(kFullWarp, a[0][step], lane / 4 * 4 + q);
      const float lower = __shfl_sync(kFullWarp, a[1][step], lane / 4 * 4 + q);
      const float* row = b + term<kRun>(step, q) * pitch + 2 * (lane % 4);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
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

// A block owns 64 rows of one chunk of columns, a warp 16 of them. The warp reads its tile of a
// panel into registers, and writes it when nobody needs the old one any more.
template <typename T, int kColumns, bool kAligned>
__global__ void __launch_bounds__(ApplyTraits<T, kColumns>::kThreads,
                                  ApplyTraits<T, kColumns>::kBlocks)
    apply_rotations_kernel(const ApplyParams p) {
  using Traits = ApplyTraits<T, kColumns>;
  constexpr int kWidth = kPanelWidth, kVector = Traits::kVector;
  constexpr int kPitch = Traits::kPitch, kKeyPitch = Traits::kKeyPitch;
  if (*p.status != 0) return;
  alignas(16) __shared__ T x[kWidth * kKeyPitch];            // -X_j
  alignas(16) __shared__ T g[(kWidth + kColumns) * kPitch];  // G_jj over W_j

  const int lane = threadIdx.x % kWarpSize;
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * Traits::kRows +
                       threadIdx.x / kWarpSize * Traits::kWarpRows;
  const int64_t own = row0 / kWidth;  // the panel of the warp's diagonal
  const int64_t rows_end = static_cast<int64_t>(blockIdx.y + 1) * Traits::kRows;
  const int64_t lowest = ((rows_end < p.n ? rows_end : p.n) - 1) / kWidth;
  const int64_t first = blockIdx.x * (p.chunk / kWidth);
  const int64_t chunk_end = first + p.chunk / kWidth;
  const int64_t end = chunk_end <= lowest ? chunk_end : lowest + 1;
  if (first >= end) return;

  const int64_t row[2] = {row0 + lane / 4, row0 + lane / 4 + 8};
  T left[2][Traits::kKeyTiles][2];  // K_i minus what X explains so far
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const T* from = static_cast<const T*>(p.residuals) +
                    (static_cast<int64_t>(blockIdx.x) * p.n + row[h]) * kColumns + 2 * (lane % 4);
#pragma unroll
    for (int tile = 0; tile < Traits::kKeyTiles; ++tile) {
      Pair<T> pair = {{T(0), T(0)}};
      // Rows above the chunk were never in it.
      if (row[h] < p.n && own >= first) pair = *reinterpret_cast<const Pair<T>*>(from + 8 * tile);
      left[h][tile][0] = pair.value[0];
      left[h][tile][1] = pair.value[1];
    }
  }

  for (int64_t panel = first; panel < end; ++panel) {
    const bool active = row0 < p.n && panel <= own;
    T* factor = static_cast<T*>(p.factor) + panel * kWidth * p.column_stride;
    T a[2][Traits::kSteps];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const T* from = factor + row[h] * p.row_stride;
      if (kAligned && active && panel < own && row[h] < p.n) {
#pragma unroll
        for (int run = 0; run < Traits::kSteps / kVector; ++run) {
          const Chunk<T> chunk =
              *reinterpret_cast<const Chunk<T>*>(from + term<kVector>(run * kVector, lane % 4));
#pragma unroll
          for (int i = 0; i < kVector; ++i) a[h][run * kVector + i] = chunk.value[i];
        }
      } else {
#pragma unroll
        for (int step = 0; step < Traits::kSteps; ++step) {
          const int64_t column = term<kVector>(step, lane % 4);
          const bool inside = active && row[h] < p.n && panel * kWidth + column <= row[h];
          a[h][step] = inside ? from[column * p.column_stride] : T(0);
        }
      }
    }

    __syncthreads();
    const T* solved = static_cast<const T*>(p.solved) + panel * kWidth * kColumns;
    for (int i = 2 * threadIdx.x; i < kWidth * kColumns; i += 2 * Traits::kThreads) {
      const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(solved + i);
      *reinterpret_cast<Pair<T>*>(x + i / kColumns * kKeyPitch +
                                  i % kColumns) = {{-pair.value[0], -pair.value[1]}};
    }
    constexpr int kElements = (kWidth + kColumns) * kWidth;
    const T* rotations = static_cast<const T*>(p.rotations) + panel * kElements;
    for (int i = 2 * threadIdx.x; i < kElements; i += 2 * Traits::kThreads) {
      *reinterpret_cast<Pair<T>*>(g + i / kWidth * kPitch + i % kWidth) =
          *reinterpret_cast<const Pair<T>*>(rotations + i);
    }
    __syncthreads();
    if (!active) continue;  // the same for the whole warp

    T out[2][Traits::kTiles][2] = {};
    multiply_add<kVector>(out, a, g, kPitch);
    if (panel < own) {
      multiply_add<kVector>(left, a, x, kKeyPitch);
      T keys[2][Traits::kKeySteps];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int step = 0; step < Traits::kKeySteps; ++step) {
          keys[h][step] = left[h][step / 2][step % 2];
        }
      }
      multiply_add<2>(out, keys, g + kWidth * kPitch, kPitch);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row[h] >= p.n) continue;
      T* to = factor + row[h] * p.row_stride;
#pragma unroll
      for (int tile = 0; tile < Traits::kTiles; ++tile) {
        const int64_t column = 8 * tile + 2 * (lane % 4);
        if (kAligned && panel < own) {
          *reinterpret_cast<Pair<T>*>(to + column) = {{out[h][tile][0], out[h][tile][1]}};
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (panel * kWidth + column + i <= row[h]) {
              to[(column + i) * p.column_stride] = out[h][tile][i];
            }
          }
        }
      }
    }
  }
}

}  // namespace coachhook
