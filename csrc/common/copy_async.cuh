// Copies from global to shared memory that a thread starts and waits for later, in groups. Groups
// end in the order they were closed in, so that many may be under way without a register or a
// scoreboard for each. What a thread copied is seen by itself after the wait; by others after a
// barrier behind it.
#pragma once

#include "launch.cuh"

namespace coachhook {

// 16 bytes, of which the first `bytes` are read and the others zeros.
__device__ __forceinline__ void copy_async_part(void* to, const void* from, int bytes) {
#ifdef COACHHOOK_HOST_SHIM
  shim::copy_async(to, from, 16, bytes);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(from), "r"(bytes)
               : "memory");
#endif
}

// 16 bytes; zeros, and nothing read, unless `reads`.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool reads) {
  copy_async_part(to, from, reads ? 16 : 0);
}

// One number of 4 or 8 bytes; zero, and nothing read, unless `reads`.
template <typename T>
__device__ __forceinline__ void copy_async_number(T* to, const T* from, bool reads) {
#ifdef COACHHOOK_HOST_SHIM
  shim::copy_async(to, from, sizeof(T), reads ? sizeof(T) : 0);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = static_cast<int>(sizeof(T));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :
               : "r"(address), "l"(from), "n"(sizeof(T)), "r"(reads ? bytes : 0)
               : "memory");
#endif
}

// Closes the group of the copies that this thread started since the last one.
__device__ __forceinline__ void close_copies() {
#ifdef COACHHOOK_HOST_SHIM
  shim::close_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Returns when all but the last kPending groups have arrived.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#ifdef COACHHOOK_HOST_SHIM
  shim::wait_for_copies(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace coachhook
