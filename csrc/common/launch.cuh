// Everything the kernels need of the CUDA runtime, in one place. A host compiler that defines
// COACHHOOK_HOST_SHIM gets the same names from tests/csrc/shim and runs the kernels on the CPU.
#pragma once

#ifdef COACHHOOK_HOST_SHIM
#include "cuda_shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define COACHHOOK_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
// With `bytes` of dynamic_shared() for each block.
#define COACHHOOK_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)
// With `overlap`, blocks may start while the kernel in front still runs: they must call
// wait_for_previous_kernel() before they touch its memory. Compute capability 9.0 and newer.
#define COACHHOOK_LAUNCH_OVERLAPPED(kernel, grid, block, stream, overlap, ...) \
  coachhook::launch_overlapped(kernel, grid, block, stream, overlap, __VA_ARGS__)
#endif

#include <cstdint>
#include <string>

#include "status.h"

namespace coachhook {

inline Status cuda_error(const char* op, const char* what, cudaError_t error) {
  return {Code::kCudaError, std::string(op) + ": " + what + " failed: " + cudaGetErrorName(error) +
                                " (" + cudaGetErrorString(error) + ")"};
}

#ifdef COACHHOOK_HOST_SHIM
inline void wait_for_previous_kernel() { races::waited_for_previous_kernel(); }
inline void let_next_kernel_start() {}
template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(shim::active->shared);
}
template <typename... Parameters>
cudaError_t allow_shared(void (*)(Parameters...), int) {
  return cudaSuccess;
}
#else
// The shared memory of a block whose size was given at the launch; aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char shared[];
  return reinterpret_cast<T*>(shared);
}

// Needed before a launch with more than 48 KiB of it; makes no call to the GPU.
template <typename... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <typename... Parameters, typename... Arguments>
void launch_overlapped(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                       bool overlap, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Returns when the kernel in front has ended and what it wrote can be read; at once where this one
// was not started early.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once every block has said so, the blocks of the next kernel may take what room is left.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

// Outcome of the launch that was just made.
inline Status launched(const char* op, const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? Status() : cuda_error(op, kernel, error);
}

constexpr int64_t kMaxGrid = 0x7fffffff;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Makes `device` current for the life of the object: a launch goes to the current device, whatever
// device the pointers belong to.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      restore_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (restore_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool restore_ = false;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace coachhook
