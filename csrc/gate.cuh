// Kernels of the hook layer's gate.
//
//   M_t   = ||c_t||_2  or  max_j c_tj                              row_magnitude_kernel
//   z_t   = (M_t - mean) / std over a scope, fired_t = z_t >= alpha      zscore_gate_kernel
//   y_t  += Q s_t  where fired                                       add_correction_kernel
//
// Products and norms in float32, statistics in float64. Every sum has one fixed order, that of the
// tokens counted from the first valid one; alignment, batch, grid and padding on either side do not
// change it, and there are no atomics: a token's decision is the same bits alone and in any batch.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/numeric.cuh"
#include "gate.h"

namespace coachhook {

struct RowTraits {
  static constexpr int kThreads = 256;
  static constexpr int kRows = kThreads / kWarpSize;  // one warp per row
  static_assert(kThreads % kWarpSize == 0 && kThreads <= 1024, "whole warps, one block");
};

struct SequenceTraits {
  static constexpr int kThreads = 256;  // one block per sequence
  static constexpr int kWarps = kThreads / kWarpSize;
  // A std within this share of the mean is rounding noise of float32 norms: z would be noise.
  static constexpr double kNoise = 8.0 * FLT_EPSILON;
  static_assert(kThreads % kWarpSize == 0 && kThreads <= 1024, "whole warps, one block");
};

struct CorrectionTraits {
  static constexpr int kThreads = 256;
  static constexpr int kOutputs = kThreads / kWarpSize;  // one warp per output feature
  static constexpr int kMaxRowBlocks = 32;  // each walks over rows, most of them not fired
};

struct NormReduction {
  using Combine = Add;
  static constexpr float kIdentity = 0.0f;
  static __device__ __forceinline__ float accumulate(float sum, float c) { return fmaf(c, c, sum); }
  static __device__ __forceinline__ float finish(float sum) { return sqrtf(sum); }
};

struct MaxReduction {
  using Combine = MaxKeepNan;
  static constexpr float kIdentity = -INFINITY;
  static __device__ __forceinline__ float accumulate(float best, float c) {
    return MaxKeepNan()(best, c);
  }
  static __device__ __forceinline__ float finish(float best) { return best; }
};

// kAligned only chooses how a chunk is loaded. Which lane adds which element, and when, stays the
// same.
template <typename T, typename R, bool kAligned>
__global__ void __launch_bounds__(RowTraits::kThreads) row_magnitude_kernel(const GateParams p) {
  constexpr int kSize = Chunk<T>::kSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * RowTraits::kRows + threadIdx.x / kWarpSize;
  if (row >= p.rows) return;

  const T* c = static_cast<const T*>(p.coefficients) + row * p.row_stride;
  float total = R::kIdentity;
  for (int64_t start = static_cast<int64_t>(lane) * kSize; start < p.rank;
       start += kWarpSize * kSize) {
    if (kAligned && start + kSize <= p.rank) {
      const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(c + start);
#pragma unroll
      for (int i = 0; i < kSize; ++i) total = R::accumulate(total, to_float(chunk.value[i]));
    } else {
      const int64_t end = start + kSize < p.rank ? start + kSize : p.rank;
      for (int64_t i = start; i < end; ++i) total = R::accumulate(total, to_float(c[i]));
    }
  }
  total = warp_reduce(total, typename R::Combine());

  if (lane == 0) {
    p.magnitude[row] = R::finish(total);
    // Rows that no sequence of cu_seqlens covers stay like this.
    p.z[row] = NAN;
    p.fired[row] = 0;
  }
}

// What magnitudes are judged against. `mean` is relative to `shift`, the first valid magnitude, so
// that equal ones have a std of exactly 0.
struct Standard {
  double shift;
  double mean;
  double std;
};

__device__ __forceinline__ Standard sequence_standard(const GateParams& p, int64_t sequence,
                                                      int64_t begin, int64_t end) {
  constexpr int kThreads = SequenceTraits::kThreads;
  __shared__ long long int_scratch[SequenceTraits::kWarps];
  __shared__ double sum_scratch[SequenceTraits::kWarps];

  long long count = 0;
  long long first = end;
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
    if (p.mask != nullptr && p.mask[t] == 0) continue;
    if (count == 0) first = t;
    ++count;
  }
  count = block_reduce<kThreads>(count, Add(), int_scratch);
  first = block_reduce<kThreads>(first, Min(), int_scratch);
  const double n = static_cast<double>(count);
  const double shift = count > 0 ? p.magnitude[first] : 0.0;

  double sum = 0.0;
  for (int64_t t = first + threadIdx.x; t < end; t += kThreads) {
    if (p.mask != nullptr && p.mask[t] == 0) continue;
    sum += p.magnitude[t] - shift;
  }
  sum = block_reduce<kThreads>(sum, Add(), sum_scratch);
  const double mean = count > 0 ? sum / n : 0.0;

  double m2 = 0.0;
  for (int64_t t = first + threadIdx.x; t < end; t += kThreads) {
    if (p.mask != nullptr && p.mask[t] == 0) continue;
    const double d = (p.magnitude[t] - shift) - mean;
    m2 = fma(d, d, m2);
  }
  m2 = block_reduce<kThreads>(m2, Add(), sum_scratch);

  if (p.state != nullptr && threadIdx.x == 0) {
    double* state = p.state + sequence * 3;
    state[0] = n;
    state[1] = shift + mean;
    state[2] = m2;
  }
  return {shift, mean, count > 1 ? sqrt(m2 / (n - 1.0)) : static_cast<double>(NAN)};
}

template <Scope kScope>
__global__ void __launch_bounds__(SequenceTraits::kThreads) zscore_gate_kernel(const GateParams p) {
  const int64_t sequence = blockIdx.x;
  int64_t begin, end;
  if (p.cu_seqlens != nullptr) {
    // The values are on the device, so no host check saw them: clamp rather than read out of
    // bounds.
    begin = p.cu_seqlens[sequence] > 0 ? p.cu_seqlens[sequence] : 0;
    end = p.cu_seqlens[sequence + 1] < p.rows ? p.cu_seqlens[sequence + 1] : p.rows;
  } else {
    const int64_t length = p.rows / p.sequences;
    begin = sequence * length;
    end = begin + length;
  }

  Standard standard = {0.0, 0.0, 1.0};
  if (kScope == Scope::kSequence) standard = sequence_standard(p, sequence, begin, end);
  if (kScope == Scope::kPopulation) {
    standard.mean = p.mean[sequence * p.population_stride];
    standard.std = p.std[sequence * p.population_stride];
  }
  // Written so that a NaN on either side leaves z undefined too.
  if (!(standard.std > SequenceTraits::kNoise * (standard.shift + standard.mean))) {
    standard.std = NAN;
  }

  const float alpha = p.alpha != nullptr ? *p.alpha : p.alpha_value;
  for (int64_t t = begin + threadIdx.x; t < end; t += SequenceTraits::kThreads) {
    const bool valid = p.mask == nullptr || p.mask[t] != 0;
    float z = p.magnitude[t];
    if (kScope != Scope::kDirect) {
      z = static_cast<float>(((z - standard.shift) - standard.mean) / standard.std);
    }
    if (!valid) z = NAN;
    p.z[t] = z;
    p.fired[t] = z >= alpha;  // false for NaN
  }
}

template <typename T>
__global__ void __launch_bounds__(CorrectionTraits::kThreads)
    add_correction_kernel(const CorrectionParams p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t out =
      static_cast<int64_t>(blockIdx.x) * CorrectionTraits::kOutputs + threadIdx.x / kWarpSize;
  if (out >= p.out_features) return;

  const float* q = p.q + out * p.q_row_stride;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    if (p.fired[row] == 0) continue;
    const float* s = p.s + row * p.s_row_stride;
    float sum = 0.0f;
    for (int64_t i = lane; i < p.rank; i += kWarpSize) sum = fmaf(q[i], s[i], sum);
    sum = warp_reduce(sum, Add());
    if (lane == 0) {
      T* y = static_cast<T*>(p.y) + row * p.y_row_stride + out;
      *y = from_float<T>(to_float(*y) + sum);
    }
  }
}

}  // namespace coachhook
