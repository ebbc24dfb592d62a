// Products with few columns at a time, of which the chains that solve with L are made, and the
// inverses of its diagonal blocks.
#pragma once

#include "cholesky.cuh"
#include "common/copy_async.cuh"

namespace coachhook {

// Where a factor A of a product is zero.
enum class Shape : int { kFull, kLower, kUpper };

// out [m, columns] = base + sign A B, with A [m, k] and B [k, columns]; base is `out` or another
// array, or null for zeros. All but A are row-major, and contiguous but for B. With kLower or
// kUpper A is square.
struct NarrowProduct {
  int m = 0;
  int k = 0;
  int sign = 1;
  Shape shape = Shape::kFull;
  const void* a = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
  const void* b = nullptr;
  int64_t b_stride = 0;  // from row to row
  const void* base = nullptr;
  void* out = nullptr;
  void* partial = nullptr;       // [2 blocks, 64, columns] sums of a part of the terms
  uint32_t* arrivals = nullptr;  // [tiles, kArrivals], zero before and after
  int stages = 2;                // of the ring in shared memory: 2, 3 or 4
};

constexpr int kTileRows = 64;   // of A and of the result
constexpr int kStepTerms = 32;  // of the sums, in one step of a block
constexpr int kTileSteps = kTileRows / kStepTerms;

template <typename T, int kColumns>
struct NarrowTraits {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  // Each warp has a strip of rows and a share of the terms of a step. The more rows, the less often
  // B is read from shared memory; the sums take 64 registers of float64 either way.
  static constexpr int kEights = kColumns == 32 ? 4 : 2;
  static constexpr int kStripRows = 8 * kEights;
  static constexpr int kStrips = kTileRows / kStripRows;
  static constexpr int kSplits = kWarps / kStrips;
  static constexpr int kTerms = kStepTerms / kSplits;
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kNumbers = kEights * kTiles * 2;  // of a sum in a lane
  static constexpr int kVector = 16 / sizeof(T);
  // 2 modulo 16 for float64: rows 2 q of four lanes and 4 columns fill the banks evenly.
  static constexpr int kPitch = kColumns + kVector;
  static constexpr int kLeft = kTileRows * kStepTerms;
  static constexpr int kStage = kLeft + kStepTerms * kPitch;
  static constexpr int kSums = kTileRows * kColumns;
  static_assert(kStrips <= kArrivals && kTerms % 8 == 0, "see multiply()");

  static constexpr int shared_bytes(int stages) {
    return (kSums + stages * kStage) * static_cast<int>(sizeof(T));
  }
};

// All steps of the tiles before one.
__host__ __device__ inline int steps_before(const NarrowProduct& p, int tile) {
  const int depth = (p.k + kStepTerms - 1) / kStepTerms, on_diagonal = kTileSteps * tile;
  switch (p.shape) {
    case Shape::kLower: {
      const int beyond = on_diagonal > depth ? on_diagonal - depth : 0;  // after the last tile
      return on_diagonal * (tile + 1) / 2 - beyond;
    }
    case Shape::kUpper:
      return tile * depth - on_diagonal * (tile - 1) / 2;
    case Shape::kFull:
      break;
  }
  return tile * depth;
}

// A step of a tile.
struct NarrowStep {
  int tile;
  int step;  // from the first terms of A
  int end;   // one after the last that is not zero
};

__device__ __forceinline__ NarrowStep first_step(const NarrowProduct& p, int tile) {
  const int depth = (p.k + kStepTerms - 1) / kStepTerms;
  const int diagonal_end = kTileSteps * (tile + 1);
  return {tile, p.shape == Shape::kUpper ? kTileSteps * tile : 0,
          p.shape == Shape::kLower && diagonal_end < depth ? diagonal_end : depth};
}

__device__ __forceinline__ NarrowStep step_at(const NarrowProduct& p, int number) {
  int low = 0, high = (p.m + kTileRows - 1) / kTileRows;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (steps_before(p, middle) <= number ? low : high) = middle;
  }
  NarrowStep at = first_step(p, low);
  at.step += number - steps_before(p, low);
  return at;
}

__device__ __forceinline__ void advance(const NarrowProduct& p, NarrowStep& at) {
  if (++at.step == at.end) at = first_step(p, at.tile + 1);
}

// Where a number of A lies in a stage. Runs of 16 bytes, along rows or down columns, are kept whole
// and change places, so that the eight lanes that read at once find all banks.
template <typename T, Layout kLayout>
__device__ __forceinline__ int left_place(int row, int term) {
  constexpr int kVector = 16 / sizeof(T);
  if (kLayout == Layout::kColumns) {
    const int run = row / kVector ^ 2 * (term / kVector % 4);
    return term * kTileRows + run * kVector + row % kVector;
  }
  const int run = term / kVector ^ 4 * (row % 2);
  return row * kStepTerms + run * kVector + term % kVector;
}

// Starts to copy what a step needs of A and B; zeros beyond their ends.
template <typename T, int kColumns, Layout kLayout>
__device__ __forceinline__ void load_step(const NarrowProduct& p, const NarrowStep& at, T* stage) {
  using Traits = NarrowTraits<T, kColumns>;
  constexpr int kVector = Traits::kVector, kThreads = Traits::kThreads;
  constexpr bool kDown = kLayout == Layout::kColumns;
  // Numbers of a copy, copies of a line along a run, and lines between two copies of a thread.
  constexpr int kNumbers = kLayout == Layout::kAny ? 1 : kVector;
  constexpr int kCopies = (kDown ? kTileRows : kStepTerms) / kNumbers;
  constexpr int kApart = kThreads / kCopies;
  static_assert(kApart % 8 == 0, "copies of a thread change their places in the same way");
  const int row0 = at.tile * kTileRows, term0 = at.step * kStepTerms;
  const int along = threadIdx.x % kCopies * kNumbers, line = threadIdx.x / kCopies;
  const int row = kDown ? along : line, term = kDown ? line : along;
  const int rows = p.m - row0 - row, terms = p.k - term0 - term;  // that are left
  const int numbers = at_most(kDown ? rows : terms, kNumbers);
  const int lines = numbers > 0 ? (kDown ? terms : rows) : 0;
  // May lie beyond the end, where nothing is read.
  const T* from = opaque(static_cast<const T*>(p.a) + (row0 + row) * p.row_stride +
                         (term0 + term) * p.column_stride);
  const int64_t apart = kApart * (kDown ? p.column_stride : p.row_stride);
  T* const to = stage + left_place<T, kLayout>(row, term);
#pragma unroll
  for (int i = 0; i < Traits::kLeft / kNumbers / kThreads; ++i) {
    T* const place = to + i * kApart * (kDown ? kTileRows : kStepTerms);
    const bool inside = i * kApart < lines;
    if (kNumbers == 1) {
      copy_async_number(place, from, inside);
    } else {
      copy_async_part(place, from, inside ? numbers * static_cast<int>(sizeof(T)) : 0);
    }
    from += apart;
  }

  constexpr int kRightCopies = kColumns / kVector, kRightApart = kThreads / kRightCopies;
  const int right_term = threadIdx.x / kRightCopies;
  const int column = threadIdx.x % kRightCopies * kVector;
  const int right_terms = p.k - term0 - right_term;
  const T* right_from =
      opaque(static_cast<const T*>(p.b) + (term0 + right_term) * p.b_stride + column);
  T* const right_to = stage + Traits::kLeft + right_term * Traits::kPitch + column;
#pragma unroll
  for (int i = 0; i < kStepTerms / kRightApart; ++i) {
    copy_async(right_to + i * kRightApart * Traits::kPitch, right_from,
               i * kRightApart < right_terms);
    right_from += kRightApart * p.b_stride;
  }
}

// Returns when the oldest of the steps under way has arrived.
__device__ __forceinline__ void wait_for_step(int stages) {
  if (stages == 4) {
    wait_for_copies<2>();
  } else if (stages == 3) {
    wait_for_copies<1>();
  } else {
    wait_for_copies<0>();
  }
}

// The row of a strip that a lane has in its eight h: two rows that share a run down a column are in
// neighbouring eights.
template <Layout kLayout>
__device__ __forceinline__ int strip_row(int h, int lane) {
  return kLayout == Layout::kColumns ? h / 2 * 16 + lane / 4 * 2 + h % 2 : h * 8 + lane / 4;
}

// Adds the products of a warp's strip and terms; lanes hold sums as mma_8x8x4 leaves them.
template <int kColumns, Layout kLayout, int kEights, int kTiles>
__device__ __forceinline__ void multiply(double (&sum)[kEights][kTiles][2], const double* stage,
                                         int strip_row0, int term0) {
  using Traits = NarrowTraits<double, kColumns>;
  const int lane = threadIdx.x % kWarpSize, q = lane % 4;
  const double* right = stage + Traits::kLeft + lane / 4;
#pragma unroll
  for (int eight = 0; eight < Traits::kTerms; eight += 8) {
    const int term = term0 + eight + 2 * q;  // and the next one
    double a[kEights][2];
    if (kLayout == Layout::kColumns) {
#pragma unroll
      for (int h = 0; h < kEights; h += 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = strip_row0 + strip_row<kLayout>(h, lane);
          const Pair<double> pair = *reinterpret_cast<const Pair<double>*>(
              stage + left_place<double, kLayout>(row, term + i));
          a[h][i] = pair.value[0];
          a[h + 1][i] = pair.value[1];
        }
      }
    } else {
#pragma unroll
      for (int h = 0; h < kEights; ++h) {
        const int row = strip_row0 + strip_row<kLayout>(h, lane);
        const Pair<double> pair =
            *reinterpret_cast<const Pair<double>*>(stage + left_place<double, kLayout>(row, term));
        a[h][0] = pair.value[0];
        a[h][1] = pair.value[1];
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const double* from = right + term * Traits::kPitch + 8 * tile;
      const double b[2] = {from[0], from[Traits::kPitch]};
#pragma unroll
      for (int h = 0; h < kEights; h += 2) {
        const double left[2][2] = {{a[h][0], a[h][1]}, {a[h + 1][0], a[h + 1][1]}};
        mma_16x8x8(sum[h][tile], sum[h + 1][tile], left, b);
      }
    }
  }
}

// The tensor cores have no product of float32 operands in full.
template <int kColumns, Layout kLayout, int kEights, int kTiles>
__device__ __forceinline__ void multiply(float (&sum)[kEights][kTiles][2], const float* stage,
                                         int strip_row0, int term0) {
  using Traits = NarrowTraits<float, kColumns>;
  const int lane = threadIdx.x % kWarpSize;
  const float* right = stage + Traits::kLeft + 2 * (lane % 4);
#pragma unroll 4
  for (int t = 0; t < Traits::kTerms; ++t) {
    float a[kEights];
#pragma unroll
    for (int h = 0; h < kEights; ++h) {
      a[h] = stage[left_place<float, kLayout>(strip_row0 + strip_row<kLayout>(h, lane), term0 + t)];
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const Pair<float> b =
          *reinterpret_cast<const Pair<float>*>(right + (term0 + t) * Traits::kPitch + 8 * tile);
#pragma unroll
      for (int h = 0; h < kEights; ++h) {
#pragma unroll
        for (int i = 0; i < 2; ++i) sum[h][tile][i] = fmaf(a[h], b.value[i], sum[h][tile][i]);
      }
    }
  }
}

// The steps of all tiles, one after the other, are dealt out evenly in runs: A is read at the speed
// of the memory only where all multiprocessors have the same share of it, whatever its shape. A
// block brings its steps to shared memory some ahead of their products. A tile that lies in several
// runs is added up by the warps that come to it last, in the order of the blocks: the number of
// blocks decides on rounding, the order in which they end does not.
template <typename T, int kColumns, Layout kLayout>
__global__ void __launch_bounds__(NarrowTraits<T, kColumns>::kThreads, 1)
    narrow_product_kernel(const NarrowProduct p) {
  using Traits = NarrowTraits<T, kColumns>;
  constexpr int kEights = Traits::kEights, kTiles = Traits::kTiles, kNumbers = Traits::kNumbers;
  T* const sums = dynamic_shared<T>();
  T* const ring = sums + Traits::kSums;

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int strip = warp % Traits::kStrips, split = warp / Traits::kStrips;
  const int64_t all = steps_before(p, (p.m + kTileRows - 1) / kTileRows), blocks = gridDim.x;
  const int begin = static_cast<int>(blockIdx.x * all / blocks);
  const int end = static_cast<int>((blockIdx.x + int64_t{1}) * all / blocks);

  NarrowStep at = step_at(p, begin), loaded = at;
  int number = begin, slot = 0;  // to be loaded next, and where to
  const auto load = [&] {
    if (number < end) {
      load_step<T, kColumns, kLayout>(p, loaded, ring + slot * Traits::kStage);
      advance(p, loaded);
      ++number;
    }
    slot = slot + 1 < p.stages ? slot + 1 : 0;
    close_copies();
  };
#pragma unroll 1
  for (int stage = 1; stage < p.stages; ++stage) load();

  T sum[kEights][kTiles][2] = {};
  T* const mine = &sum[0][0][0];
  for (int now = begin, from = 0; now < end; ++now, from = from + 1 < p.stages ? from + 1 : 0) {
    wait_for_step(p.stages);
    __syncthreads();
    load();
    multiply<kColumns, kLayout>(sum, ring + from * Traits::kStage, strip * Traits::kStripRows,
                                split * Traits::kTerms);
    const int tile = at.tile;
    const bool ends = at.step + 1 == at.end;
    advance(p, at);
    if (!ends && now + 1 < end) continue;

    T* const shared = sums + strip * kNumbers * kWarpSize + lane;
#pragma unroll 1
    for (int other = 1; other < Traits::kSplits; ++other) {
      if (split == other) {
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) shared[i * kWarpSize] = mine[i];
      }
      __syncthreads();
      if (split == 0) {
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) mine[i] += shared[i * kWarpSize];
      }
      __syncthreads();
    }

    bool last = split == 0;
    const int first_of_tile = steps_before(p, tile), end_of_tile = steps_before(p, tile + 1);
    if (last && (first_of_tile < begin || end_of_tile > end)) {
      // The block of step s is the last one that begins at or before it.
      const auto block_of = [=](int step) {
        return static_cast<int>(((step + int64_t{1}) * blocks - 1) / all);
      };
      const int first = block_of(first_of_tile), behind = block_of(end_of_tile - 1) + 1;
      T* const partial = static_cast<T*>(p.partial) + strip * kNumbers * kWarpSize + lane;
      // A block is the first one of one tile at most that goes on after it.
      const auto place = [=](int block) {
        return partial + (2 * int64_t{block} + (block == first)) * Traits::kSums;
      };
      T* const own = place(blockIdx.x);
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) own[i * kWarpSize] = mine[i];
      __threadfence();
      __syncwarp();
      uint32_t* const arrivals = p.arrivals + tile * kArrivals + strip;
      const uint32_t before = lane == 0 ? atomicAdd(arrivals, 1u) : 0u;
      last = __shfl_sync(kFullWarp, before, 0) + 1 == static_cast<uint32_t>(behind - first);
      if (last) {
        __threadfence();
        if (lane == 0) *arrivals = 0;
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) mine[i] = T(0);
        for (int block = first; block < behind; ++block) {
          const T* const theirs = place(block);
#pragma unroll
          for (int i = 0; i < kNumbers; ++i) mine[i] += __ldcg(theirs + i * kWarpSize);
        }
      }
    }
    if (last) {
      const T sign = static_cast<T>(p.sign);
#pragma unroll
      for (int h = 0; h < kEights; ++h) {
        const int row = tile * kTileRows + strip * Traits::kStripRows + strip_row<kLayout>(h, lane);
        if (row >= p.m) continue;
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          const int where = row * kColumns + 8 * t + 2 * (lane % 4);
          Pair<T> pair = {{T(0), T(0)}};
          if (p.base != nullptr) {
            pair = *reinterpret_cast<const Pair<T>*>(static_cast<const T*>(p.base) + where);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) pair.value[i] += sign * sum[h][t][i];
          *reinterpret_cast<Pair<T>*>(static_cast<T*>(p.out) + where) = pair;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) mine[i] = T(0);
  }
}

// The inverses of blocks of 2 size rows from those of size rows, all in their places:
//   [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]].
// The first launch leaves B A^-1 in scratch [pairs, size, size], the second multiplies by -C^-1.
// blockIdx.x is a tile of rows, blockIdx.y 64 columns, blockIdx.z a pair; the lower block of the
// last pair may end early. kLayout is that of L, and kRows in the second launch.
template <typename T, Layout kLayout>
__global__ void __launch_bounds__(NarrowTraits<T, 64>::kThreads, 1)
    double_inverses_kernel(const InverseParams p, int size, bool second, int stages) {
  constexpr int kColumns = 64;
  using Traits = NarrowTraits<T, kColumns>;
  constexpr int kEights = Traits::kEights, kTiles = Traits::kTiles, kNumbers = Traits::kNumbers;
  static_assert(Traits::kSplits == 2, "one half is added to the other");
  T* const sums = dynamic_shared<T>();
  T* const ring = sums + Traits::kSums;

  const int64_t top = int64_t{2} * size * blockIdx.z, middle = top + size;
  const int lower = middle + size <= p.n ? size : static_cast<int>(p.n - middle);
  if (static_cast<int>(blockIdx.x) * kTileRows >= lower) return;
  T* const upper = static_cast<T*>(p.inverses) + top * (p.rows + 1);  // A^-1
  T* const between = static_cast<T*>(p.scratch) + int64_t{blockIdx.z} * size * size;
  const int column0 = blockIdx.y * kColumns;
  NarrowProduct product;
  product.m = lower;
  NarrowStep at = {static_cast<int>(blockIdx.x), 0, 0};
  T* out = nullptr;
  if (second) {
    product.k = lower;
    product.a = upper + size * (p.rows + 1);
    product.row_stride = p.rows;
    product.column_stride = 1;
    product.b = between + column0;
    product.b_stride = size;
    const int depth = (lower + kStepTerms - 1) / kStepTerms;
    at.end = at_most(kTileSteps * (at.tile + 1), depth);
    out = upper + size * p.rows + column0;
  } else {
    product.k = size;
    product.a = static_cast<const T*>(p.factor) + middle * p.row_stride + top * p.column_stride;
    product.row_stride = p.row_stride;
    product.column_stride = p.column_stride;
    product.b = upper + column0;
    product.b_stride = p.rows;
    at.step = column0 / kStepTerms;  // above its diagonal A^-1 is zero
    at.end = size / kStepTerms;
    out = between + column0;
  }
  const int64_t out_stride = second ? p.rows : size;

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int strip = warp % Traits::kStrips, split = warp / Traits::kStrips;
  const int end = at.end;
  int now = at.step, slot = 0;
  const auto load = [&] {
    if (at.step < end) {
      load_step<T, kColumns, kLayout>(product, at, ring + slot * Traits::kStage);
      ++at.step;
    }
    slot = slot + 1 < stages ? slot + 1 : 0;
    close_copies();
  };
#pragma unroll 1
  for (int stage = 1; stage < stages; ++stage) load();
  T sum[kEights][kTiles][2] = {};
  for (int from = 0; now < end; ++now, from = from + 1 < stages ? from + 1 : 0) {
    wait_for_step(stages);
    __syncthreads();
    load();
    multiply<kColumns, kLayout>(sum, ring + from * Traits::kStage, strip * Traits::kStripRows,
                                split * Traits::kTerms);
  }

  T* const numbers = &sum[0][0][0];
  T* const shared = sums + strip * kNumbers * kWarpSize + lane;
  if (split == 1) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) shared[i * kWarpSize] = numbers[i];
  }
  __syncthreads();
  if (split == 1) return;
  const T sign = second ? T(-1) : T(1);
#pragma unroll
  for (int h = 0; h < kEights; ++h) {
    const int row = at.tile * kTileRows + strip * Traits::kStripRows + strip_row<kLayout>(h, lane);
    if (row >= lower) continue;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      Pair<T> pair;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int number = (h * kTiles + t) * 2 + i;
        pair.value[i] = sign * (sum[h][t][i] + shared[number * kWarpSize]);
      }
      *reinterpret_cast<Pair<T>*>(out + row * out_stride + 8 * t + 2 * (lane % 4)) = pair;
    }
  }
}

}  // namespace coachhook
