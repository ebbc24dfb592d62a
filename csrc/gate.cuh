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

// Called by the whole block. `magnitude` and `mask` are indexed by token; `state` receives (count,
// mean, M2) or is null.
__device__ __forceinline__ Standard sequence_standard(const float* magnitude, const uint8_t* mask,
                                                      double* state, int64_t begin, int64_t end) {
  constexpr int kThreads = SequenceTraits::kThreads;
  __shared__ long long int_scratch[SequenceTraits::kWarps];
  __shared__ double sum_scratch[SequenceTraits::kWarps];

  long long count = 0;
  long long first = end;
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
    if (mask != nullptr && mask[t] == 0) continue;
    if (count == 0) first = t;
    ++count;
  }
  count = block_reduce<kThreads>(count, Add(), int_scratch);
  first = block_reduce<kThreads>(first, Min(), int_scratch);
  const double n = static_cast<double>(count);
  const double shift = count > 0 ? magnitude[first] : 0.0;

  double sum = 0.0;
  for (int64_t t = first + threadIdx.x; t < end; t += kThreads) {
    if (mask != nullptr && mask[t] == 0) continue;
    sum += magnitude[t] - shift;
  }
  sum = block_reduce<kThreads>(sum, Add(), sum_scratch);
  const double mean = count > 0 ? sum / n : 0.0;

  double m2 = 0.0;
  for (int64_t t = first + threadIdx.x; t < end; t += kThreads) {
    if (mask != nullptr && mask[t] == 0) continue;
    const double d = (magnitude[t] - shift) - mean;
    m2 = fma(d, d, m2);
  }
  m2 = block_reduce<kThreads>(m2, Add(), sum_scratch);

  if (state != nullptr && threadIdx.x == 0) {
    state[0] = n;
    state[1] = shift + mean;
    state[2] = m2;
  }
  return {shift, mean, count > 1 ? sqrt(m2 / (n - 1.0)) : static_cast<double>(NAN)};
}

// Written so that a NaN on either side leaves z undefined too.
__device__ __forceinline__ Standard without_noise(Standard standard) {
  if (!(standard.std > SequenceTraits::kNoise * (standard.shift + standard.mean))) {
    standard.std = NAN;
  }
  return standard;
}

__device__ __forceinline__ float standard_score(float magnitude, const Standard& standard) {
  return static_cast<float>(((magnitude - standard.shift) - standard.mean) / standard.std);
}

struct Span {
  int64_t begin;
  int64_t end;
};

// Tokens of a sequence. The values of cu_seqlens are on the device, so no host check saw them:
// clamp rather than read out of bounds.
__device__ __forceinline__ Span sequence_span(const GateParams& p, int64_t sequence) {
  if (p.cu_seqlens == nullptr) {
    const int64_t length = p.rows / p.sequences;
    return {sequence * length, (sequence + 1) * length};
  }
  return {p.cu_seqlens[sequence] > 0 ? p.cu_seqlens[sequence] : 0,
          p.cu_seqlens[sequence + 1] < p.rows ? p.cu_seqlens[sequence + 1] : p.rows};
}

template <Scope kScope>
__global__ void __launch_bounds__(SequenceTraits::kThreads) zscore_gate_kernel(const GateParams p) {
  const int64_t sequence = blockIdx.x;
  const auto [begin, end] = sequence_span(p, sequence);

  Standard standard = {0.0, 0.0, 1.0};
  if (kScope == Scope::kSequence) {
    double* state = p.state == nullptr ? nullptr : p.state + sequence * 3;
    standard = sequence_standard(p.magnitude, p.mask, state, begin, end);
  }
  if (kScope == Scope::kPopulation) {
    standard.mean = p.mean[sequence * p.population_stride];
    standard.std = p.std[sequence * p.population_stride];
  }
  standard = without_noise(standard);

  const float alpha = p.alpha != nullptr ? *p.alpha : p.alpha_value;
  for (int64_t t = begin + threadIdx.x; t < end; t += SequenceTraits::kThreads) {
    const bool valid = p.mask == nullptr || p.mask[t] != 0;
    float z = p.magnitude[t];
    if (kScope != Scope::kDirect) z = standard_score(z, standard);
    if (!valid) z = NAN;
    p.z[t] = z;
    p.fired[t] = z >= alpha;  // false for NaN
  }
}

// q . s over `rank` terms, by a whole warp; the same sum in every lane. Alignment chooses how q is
// loaded, not the order.
template <typename T>
__device__ __forceinline__ float warp_dot(const T* q, const float* s, int64_t rank, int lane) {
  constexpr int kSize = Chunk<T>::kSize;
  float sum = 0.0f;
  for (int64_t start = static_cast<int64_t>(lane) * kSize; start < rank;
       start += kWarpSize * kSize) {
    if (start + kSize <= rank && is_aligned(q + start)) {
      const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(q + start);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum = fmaf(to_float(chunk.value[i]), s[start + i], sum);
    } else {
      const int64_t end = start + kSize < rank ? start + kSize : rank;
      for (int64_t i = start; i < end; ++i) sum = fmaf(to_float(q[i]), s[i], sum);
    }
  }
  return warp_reduce(sum, Add());
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
    const float sum = warp_dot(q, s, p.rank, lane);
    if (lane == 0) {
      T* y = static_cast<T*>(p.y) + row * p.y_row_stride + out;
      *y = from_float<T>(to_float(*y) + sum);
    }
  }
}

}  // namespace coachhook
