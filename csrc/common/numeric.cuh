// Element types, and reductions whose order never depends on the launch: equal input gives equal
// bits.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace coachhook {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// 16 bytes of consecutive elements, the widest load.
template <typename T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

__host__ __device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

struct Add {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Min {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

// fmaxf drops NaN; a NaN coefficient must reach the gate, which then stays shut.
struct MaxKeepNan {
  __device__ __forceinline__ float operator()(float a, float b) const {
    return (a != a || a > b) ? a : b;
  }
};

template <typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// The same result in every thread. `scratch` holds one element per warp and is free again on
// return.
template <int kThreads, typename T, typename Op>
__device__ __forceinline__ T block_reduce(T value, Op op, T* scratch) {
  static_assert(kThreads % kWarpSize == 0, "whole warps only");
  value = warp_reduce(value, op);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T total = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarpSize; ++warp) total = op(total, scratch[warp]);
  __syncthreads();
  return total;
}

}  // namespace coachhook
