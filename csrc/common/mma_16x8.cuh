// Warp-wide products on tensor cores, C += A B for a 16 x 8 tile of float32.
//
// Fragments as in "Warp-level matrix instructions" of the PTX ISA, with g = lane / 4, t = lane % 4:
//   a[0], a[2]: row g of A        b[0], b[1]: column g of B      c[0], c[1]: C[g][2t, 2t + 1]
//   a[1], a[3]: row g + 8                                        c[2], c[3]: C[g + 8][2t, 2t + 1]
// Which terms of the sum a lane holds is free as long as A and B agree: callers give it consecutive
// ones. An element of C depends on its own row and column alone.
#pragma once

#include <type_traits>

#include "numeric.cuh"

namespace coachhook {

// The upper 11 bits of a float32, rounded to nearest: what a TF32 product reads of it.
__device__ __forceinline__ uint32_t to_tf32(float v) {
  return (__float_as_uint(v) + 0x1000u) & 0xffffe000u;
}

// v as the sum of two TF32 numbers, to 2^-23 of v.
struct Tf32Pair {
  uint32_t high, low;
};

__device__ __forceinline__ Tf32Pair split_tf32(float v) {
  const uint32_t high = to_tf32(v);
  return {high, to_tf32(v - __uint_as_float(high))};
}

#ifdef COACHHOOK_HOST_SHIM

// 16 terms of two 16-bit numbers a register, or 8 of TF32.
template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  shim::mma_16x8(c, a, b, sizeof(T) == 2 ? 16 : 8, [](uint32_t bits, int half) -> float {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(bits & 0xffffe000u);
    } else {
      T value;
      const uint16_t part = static_cast<uint16_t>(half ? bits >> 16 : bits);
      std::memcpy(&value, &part, sizeof(value));
      return to_float(value);
    }
  });
}

#else

template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

#endif

}  // namespace coachhook
