// The part of CUDA that csrc/ uses, on the host. A CUDA thread is a fiber (ucontext) that runs
// until it waits at a barrier or a shuffle; blocks run one after another. Which of the runnable
// fibers goes next is a priority list chosen by SHIM_ORDER (0 ascending, 1 descending, else a
// seeded permutation of warps and of the lanes in them), and so is the order of the blocks. The
// first in the list always runs as far as it can, so that a missing barrier lets one warp overtake
// another. Warps are converged at shuffles only, as on a GPU. With SHIM_RACES accesses that nothing
// orders are found whatever the order, see races.cpp.
//
// Not modelled: several blocks at once, the GPU's memory model, timing.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef SHIM_RACES
#include "races.h"
#else
namespace races {
inline void start_launch(bool) {}
inline void end_launch() {}
inline void start_block(unsigned, unsigned, const void*, size_t) {}
inline void run(int, const void*, size_t) {}
inline void block_barrier() {}
inline void warp_barrier(unsigned) {}
inline void shuffle(unsigned) {}
inline void fence() {}
inline void atomic(void*, size_t) {}
inline void waited_for_previous_kernel() {}
inline void copy_started(void*, size_t, const void*, size_t) {}
inline void copy_arrived(void*, size_t, const void*, size_t) {}
struct Quiet {
  Quiet() {}
};
}  // namespace races
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time; statics have red zones under ASan

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 << 10;

enum class Wait { kNothing, kBlock, kWarp, kShuffle };

// A copy that was started and not waited for: it happens at the wait, as late as it may.
struct Copy {
  void* to;
  const void* from;
  size_t size, read;  // zeros after what is read
  unsigned group;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  unsigned index = 0;
  Wait wait = Wait::kNothing;
  bool done = false;
  void* fake_stack = nullptr;
  std::vector<Copy> copies;
  unsigned groups = 0;
};

struct Warp {
  uint64_t slot[kWarp];
  uint32_t left[kWarp][4], right[kWarp][2];
  unsigned waiting = 0;
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> order;
  Fiber* current = nullptr;
  unsigned alive = 0;
  unsigned waiting = 0;
  dim3 index, block, grid;
  std::function<void()> body;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  unsigned char* shared = nullptr;
};

inline Block* active = nullptr;

inline void enter(void** save, const void* bottom, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, bottom, size);
#else
  (void)save, (void)bottom, (void)size;
#endif
}

inline void entered(void* saved, const void** bottom, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, bottom, size);
#else
  (void)saved, (void)bottom, (void)size;
#endif
}

inline void yield(Wait wait) {
  Fiber* me = active->current;
  me->wait = wait;
  enter(me->done ? nullptr : &me->fake_stack, active->stack_bottom, active->stack_size);
  swapcontext(&me->context, &active->scheduler);
  entered(me->fake_stack, nullptr, nullptr);
}

inline void run_fiber() {
  entered(nullptr, &active->stack_bottom, &active->stack_size);
  active->body();
  const races::Quiet quiet;
  active->current->done = true;
  --active->alive;
  yield(Wait::kNothing);
}

inline void sync_block() {
  const races::Quiet quiet;
  ++active->waiting;
  yield(Wait::kBlock);
}

inline void sync_warp(Wait wait = Wait::kShuffle) {
  const races::Quiet quiet;
  ++active->warps[active->current->index / kWarp].waiting;
  yield(wait);
}

// Opens the barriers that every living thread has reached.
inline void release(Block& block) {
  if (block.waiting > 0 && block.waiting == block.alive) {
    block.waiting = 0;
    for (Fiber& f : block.fibers) {
      if (f.wait == Wait::kBlock) f.wait = Wait::kNothing;
    }
    races::block_barrier();
  }
  for (unsigned w = 0; w < block.warps.size(); ++w) {
    const unsigned begin = w * kWarp;
    const unsigned end = std::min<unsigned>(begin + kWarp, block.fibers.size());
    unsigned alive = 0;
    for (unsigned i = begin; i < end; ++i) alive += !block.fibers[i].done;
    if (block.warps[w].waiting == 0 || block.warps[w].waiting != alive) continue;
    block.warps[w].waiting = 0;
    Wait kind = Wait::kNothing;
    for (unsigned i = begin; i < end; ++i) {
      Fiber& f = block.fibers[i];
      if (f.done) continue;
      if (kind != Wait::kNothing && f.wait != kind) {
        std::fprintf(stderr, "shim: half a warp waits at a barrier, the rest at a shuffle\n");
        std::abort();
      }
      kind = f.wait;
      f.wait = Wait::kNothing;
    }
    kind == Wait::kWarp ? races::warp_barrier(w) : races::shuffle(w);
  }
}

inline std::vector<unsigned> priorities(unsigned threads, unsigned seed) {
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  std::vector<unsigned> warp_order(warps), result;
  for (unsigned w = 0; w < warps; ++w) warp_order[w] = w;
  std::mt19937 random(seed);
  if (seed == 1) std::reverse(warp_order.begin(), warp_order.end());
  if (seed > 1) std::shuffle(warp_order.begin(), warp_order.end(), random);
  for (unsigned w : warp_order) {
    std::vector<unsigned> lanes;
    for (unsigned i = w * kWarp; i < std::min(threads, (w + 1) * kWarp); ++i) lanes.push_back(i);
    if (seed == 1) std::reverse(lanes.begin(), lanes.end());
    if (seed > 1) std::shuffle(lanes.begin(), lanes.end(), random);
    result.insert(result.end(), lanes.begin(), lanes.end());
  }
  return result;
}

inline void run_block(Block& block) {
  const unsigned threads = block.block.x * block.block.y * block.block.z;
  if (block.fibers.size() != threads) block.fibers = std::vector<Fiber>(threads);
  block.warps.assign((threads + kWarp - 1) / kWarp, Warp());
  block.alive = threads;
  block.waiting = 0;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = block.fibers[i];
    f.index = i;
    f.thread = dim3(i % block.block.x, i / block.block.x % block.block.y,
                    i / (block.block.x * block.block.y));
    f.wait = Wait::kNothing;
    f.done = false;
    f.fake_stack = nullptr;
    f.copies.clear();
    f.groups = 0;
    if (!f.stack) f.stack.reset(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
  }
  while (block.alive > 0) {
    Fiber* next = nullptr;
    for (unsigned i : block.order) {
      Fiber& f = block.fibers[i];
      if (!f.done && f.wait == Wait::kNothing) {
        next = &f;
        break;
      }
    }
    if (next == nullptr) {
      std::fprintf(stderr, "shim: deadlock, a barrier was not reached by every thread\n");
      std::abort();
    }
    block.current = next;
    enter(&block.fake_stack, next->stack.get(), kStack);
    races::run(static_cast<int>(next->index), next->stack.get(), kStack);
    swapcontext(&block.scheduler, &next->context);
    races::run(-1, nullptr, 0);
    entered(block.fake_stack, nullptr, nullptr);
    release(block);
  }
}

// Whether a step of a kernel is done that a test has numbered; SHIM_SKIP is the one left out.
inline const int skipped = std::getenv("SHIM_SKIP") ? std::atoi(std::getenv("SHIM_SKIP")) : -1;
inline bool keeps(int step) { return step != skipped; }

inline unsigned order() {
  const char* seed = std::getenv("SHIM_ORDER");
  return seed ? std::strtoul(seed, nullptr, 10) : 0;
}

template <typename Kernel>
void launch(bool overlapped, dim3 grid, dim3 threads, size_t shared, Kernel kernel) {
  races::start_launch(overlapped);
  Block block;
  block.grid = grid;
  block.block = threads;
  block.body = kernel;
  block.order = priorities(threads.x * threads.y * threads.z, order());
  active = &block;
  std::vector<unsigned> indices(grid.x * grid.y * grid.z);
  for (unsigned i = 0; i < indices.size(); ++i) indices[i] = i;
  std::mt19937 random(order());
  if (order() == 1) std::reverse(indices.begin(), indices.end());
  if (order() > 1) std::shuffle(indices.begin(), indices.end(), random);
  for (unsigned i : indices) {
    block.index = dim3(i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y));
    // Of its own, so that whoever reads beyond it is seen; not zero.
    const std::unique_ptr<unsigned char[]> memory(new unsigned char[shared]);
    std::memset(memory.get(), 0xff, shared);
    block.shared = memory.get();
    races::start_block(i, block.order.size(), memory.get(), shared);
    run_block(block);
  }
  races::end_launch();
  active = nullptr;
}

// Whoever reads before the wait finds NaN.
inline void copy_async(void* to, const void* from, size_t size, size_t read) {
  const races::Quiet quiet;
  Fiber& f = *active->current;
  if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size) {
    std::fprintf(stderr, "shim: a copy of %zu bytes is not aligned\n", size);
    std::abort();
  }
  f.copies.push_back({to, from, size, read, f.groups});
  std::memset(to, 0xff, size);
  races::copy_started(to, size, from, read);
}

inline void close_copies() {
  const races::Quiet quiet;
  ++active->current->groups;
}

inline void wait_for_copies(unsigned pending) {
  const races::Quiet quiet;
  Fiber& f = *active->current;
  const auto arrives = [&f, pending](const Copy& c) { return c.group + pending < f.groups; };
  for (const Copy& c : f.copies) {
    if (!arrives(c)) continue;
    std::memset(c.to, 0, c.size);
    std::memcpy(c.to, c.from, c.read);
    races::copy_arrived(c.to, c.size, c.from, c.read);
  }
  f.copies.erase(std::remove_if(f.copies.begin(), f.copies.end(), arrives), f.copies.end());
}

// C += A B by a warp, A 16 x depth and B depth x 8, in the fragments of csrc/common/mma_16x8.cuh.
// `number(register, half)` is one of the one or two numbers in a register.
template <typename Number>
void mma_16x8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int depth,
              Number number) {
  const races::Quiet quiet;
  const unsigned lane = active->current->index % kWarp;
  Warp& warp = active->warps[active->current->index / kWarp];
  std::memcpy(warp.left[lane], a, sizeof(a));
  std::memcpy(warp.right[lane], b, sizeof(b));
  sync_warp();
  const int per_register = depth / 8;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < depth; ++k) {
      const int pair = k / (depth / 2), holder = k % (depth / 2) / per_register;
      const float left =
          number(warp.left[row % 8 * 4 + holder][row / 8 + 2 * pair], k % per_register);
      c[i] += left * number(warp.right[column * 4 + holder][pair], k % per_register);
    }
  }
  sync_warp();
}

}  // namespace shim

#define threadIdx (shim::active->current->thread)
#define blockIdx (shim::active->index)
#define blockDim (shim::active->block)
#define gridDim (shim::active->grid)
#define COACHHOOK_LAUNCH(kernel, grid, block, stream, ...) \
  COACHHOOK_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)
#define COACHHOOK_LAUNCH_SHARED(kernel, grid, block, bytes, stream, ...) \
  ((void)(stream), shim::launch(false, grid, block, bytes, [&] { kernel(__VA_ARGS__); }))
// As if it always overlapped.
#define COACHHOOK_LAUNCH_OVERLAPPED(kernel, grid, block, stream, overlap, ...) \
  ((void)(stream), (void)(overlap),                                            \
   shim::launch(true, grid, block, 0, [&] { kernel(__VA_ARGS__); }))

inline void __syncthreads() { shim::sync_block(); }
inline void __syncwarp() { shim::sync_warp(shim::Wait::kWarp); }
inline void __threadfence() { races::fence(); }
inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  const races::Quiet quiet;
  races::atomic(address, sizeof(*address));
  const uint32_t before = *address;
  *address += value;
  return before;
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}

inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

namespace shim {

inline unsigned lane() { return active->current->index % kWarp; }

// Every lane leaves a value; `read` sees those of the whole warp.
template <typename T, typename Read>
void exchange(T value, Read read) {
  const races::Quiet quiet;
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  Warp& warp = active->warps[active->current->index / kWarp];
  std::memcpy(&warp.slot[lane()], &value, sizeof(T));
  sync_warp();
  read([&warp](unsigned from) {
    T result;
    std::memcpy(&result, &warp.slot[from % kWarp], sizeof(T));
    return result;
  });
  sync_warp();
}

// sum [8, 8] += A [8, 4] B [4, 8], distributed as in mma.sync.m8n8k4.f64.
inline void mma_8x8x4(double (&sum)[2], double a, double b) {
  const races::Quiet quiet;
  Warp& warp = active->warps[active->current->index / kWarp];
  const unsigned row = lane() / 4, column = 2 * (lane() % 4);
  std::memcpy(&warp.slot[lane()], &a, sizeof(a));
  std::memcpy(&warp.left[lane()], &b, sizeof(b));
  sync_warp();
  for (unsigned k = 0; k < 4; ++k) {
    double left, right[2];
    std::memcpy(&left, &warp.slot[4 * row + k], sizeof(left));
    for (unsigned i = 0; i < 2; ++i) {
      std::memcpy(&right[i], &warp.left[4 * (column + i) + k], sizeof(right[i]));
      sum[i] = std::fma(left, right[i], sum[i]);
    }
  }
  sync_warp();
}

}  // namespace shim

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  if (mask != 0xffffffffu) std::abort();
  T result;
  shim::exchange(value, [&](auto of) { result = of(source); });
  return result;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  if (mask != 0xffffffffu) std::abort();
  T result;
  shim::exchange(value, [&](auto of) { result = of(shim::lane() ^ lane_mask); });
  return result;
}

// 16-bit floats: exact to float, round to nearest even from it.
struct __half {
  _Float16 value;
};
inline float __half2float(__half v) { return static_cast<float>(v.value); }
inline __half __float2half_rn(float v) { return {static_cast<_Float16>(v)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// Runtime calls of the host code: one device, no errors.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaSuccess"; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
// SHIM_SHARED: bytes, else those of an H200.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* bytes = std::getenv("SHIM_SHARED");
  return *value = bytes ? std::atoi(bytes) : 227 << 10, cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }
