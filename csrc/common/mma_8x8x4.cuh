// The fp64 product of the tensor cores, one warp at a time.
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

}  // namespace coachhook
