// The fp64 products of the tensor cores, one warp at a time.
#pragma once

#include "launch.cuh"

namespace coachhook {

// sum [8, 8] += A [8, 4] B [4, 8]. Lane l holds A[l / 4][l % 4], B[l % 4][l / 4] and
// sum[l / 4][2 (l % 4) + {0, 1}]. All 32 lanes must call it.
__device__ __forceinline__ void mma_8x8x4(double (&sum)[2], double a, double b) {
#ifdef COACHHOOK_HOST_SHIM
  shim::mma_8x8x4(sum, a, b);
#else
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(sum[0]), "+d"(sum[1])
               : "d"(a), "d"(b));
#endif
}

// The same for 16 rows and eight terms, in the same places: upper and a[0] belong to rows 0 to 7,
// lower and a[1] to 8 to 15; a[.][i] and b[i] to terms 4 i to 4 i + 3. One instruction on sm_90,
// for which a[0][0], a[1][0], a[0][1], a[1][1] must be neighbouring registers.
__device__ __forceinline__ void mma_16x8x8(double (&upper)[2], double (&lower)[2],
                                           const double (&a)[2][2], const double (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+d"(upper[0]), "+d"(upper[1]), "+d"(lower[0]), "+d"(lower[1])
      : "d"(a[0][0]), "d"(a[1][0]), "d"(a[0][1]), "d"(a[1][1]), "d"(b[0]), "d"(b[1]));
#else
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    mma_8x8x4(upper, a[0][i], b[i]);
    mma_8x8x4(lower, a[1][i], b[i]);
  }
#endif
}

}  // namespace coachhook
