// The part of CUDA that csrc/ uses, on the host. A CUDA thread is a fiber that runs until it waits
// at a barrier or a shuffle; blocks run one after another. Which of the runnable
// fibers goes next is a priority list chosen by SHIM_ORDER (0 ascending, 1 descending, else a
// seeded permutation of warps and of the lanes in them), and so is the order of the blocks. The
// first in the list always runs as far as it can, so that a missing barrier lets one warp overtake
// another. Warps are converged at shuffles only, as on a GPU. With SHIM_RACES accesses that nothing
// orders are found whatever the order, see races.cpp.
//
// Not modelled: several blocks at once, the GPU's memory model, timing.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

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
#include <sanitizer/asan_interface.h>
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

// Where somebody goes on who has left the processor to somebody else.
#if defined(__x86_64__)
struct Place {
  void* top = nullptr;  // of a stack with the registers that a call keeps
};

// What swapcontext does without its system calls, which took most of the tests' time.
__attribute__((naked, noinline)) inline void exchange_stacks(void** /*left*/, void* /*taken*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

inline void change(Place& left, Place& taken) { exchange_stacks(&left.top, taken.top); }

inline void begin_at(Place& place, char* stack, size_t size, void (*entry)()) {
  // As a call leaves it: the address to return to, which nobody uses, on a multiple of 16.
  auto* top = reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(stack + size) & ~15ull);
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  place.top = top;
}
#else
struct Place {
  ucontext_t context;
};

inline void change(Place& left, Place& taken) { swapcontext(&left.context, &taken.context); }

inline void begin_at(Place& place, char* stack, size_t size, void (*entry)()) {
  getcontext(&place.context);
  place.context.uc_stack.ss_sp = stack;
  place.context.uc_stack.ss_size = size;
  place.context.uc_link = nullptr;
  makecontext(&place.context, entry, 0);
}
#endif

struct Fiber {
  Place place;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  unsigned index = 0;
  unsigned rank = 0;  // among the threads of the block: the first that may run does
  Wait wait = Wait::kNothing;
  bool done = false;
  void* fake_stack = nullptr;
  std::vector<Copy> copies;
  unsigned groups = 0;
};

// Kept for the next launch: new stacks cost more than a small kernel.
inline std::vector<Fiber> fibers;

struct Warp {
  uint64_t slot[kWarp];
  double one[kWarp], other[kWarp];
  float left[16][16], right[8][16];
  unsigned alive = 0;
  unsigned waiting = 0;
};

struct Block {
  Place scheduler;
  std::vector<Warp> warps;
  std::vector<unsigned> order;
  std::vector<uint64_t> ready;  // a bit for each place in the order
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
  change(me->place, active->scheduler);
  entered(me->fake_stack, nullptr, nullptr);
}

inline void run_fiber() {
  entered(nullptr, &active->stack_bottom, &active->stack_size);
  active->body();
  const races::Quiet quiet;
  active->current->done = true;
  --active->alive;
  --active->warps[active->current->index / kWarp].alive;
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

// What a stack of before still says of frames that nobody returned from.
inline void forget_frames(char* stack) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack + kStack - 4096, 4096);
#else
  (void)stack;
#endif
}

inline void set_ready(Block& block, Fiber& f) {
  f.wait = Wait::kNothing;
  block.ready[f.rank / 64] |= uint64_t{1} << f.rank % 64;
}

// Opens the barriers that every living thread has reached, now that `last` has left off.
inline void release(Block& block, const Fiber& last) {
  if (block.waiting > 0 && block.waiting == block.alive) {
    block.waiting = 0;
    for (unsigned i : block.order) {
      if (fibers[i].wait == Wait::kBlock) set_ready(block, fibers[i]);
    }
    races::block_barrier();
  }
  // Of the other warps nothing has changed.
  const unsigned w = last.index / kWarp, begin = w * kWarp;
  const unsigned end = std::min<unsigned>(begin + kWarp, block.order.size());
  if (block.warps[w].waiting == 0 || block.warps[w].waiting != block.warps[w].alive) return;
  block.warps[w].waiting = 0;
  Wait kind = Wait::kNothing;
  for (unsigned i = begin; i < end; ++i) {
    Fiber& f = fibers[i];
    if (f.done) continue;
    if (kind != Wait::kNothing && f.wait != kind) {
      std::fprintf(stderr, "shim: half a warp waits at a barrier, the rest at a shuffle\n");
      std::abort();
    }
    kind = f.wait;
    set_ready(block, f);
  }
  kind == Wait::kWarp ? races::warp_barrier(w) : races::shuffle(w);
}

inline Fiber* first_ready(Block& block) {
  for (size_t i = 0; i < block.ready.size(); ++i) {
    if (block.ready[i]) {
      return &fibers[block.order[64 * i + __builtin_ctzll(block.ready[i])]];
    }
  }
  return nullptr;
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
  const unsigned threads = block.order.size();
  if (fibers.size() < threads) fibers.resize(threads);
  block.warps.assign((threads + kWarp - 1) / kWarp, Warp());
  block.ready.assign((threads + 63) / 64, 0);
  block.alive = threads;
  block.waiting = 0;
  for (unsigned rank = 0; rank < threads; ++rank) {
    const unsigned i = block.order[rank];
    Fiber& f = fibers[i];
    f.index = i;
    f.rank = rank;
    f.thread = dim3(i % block.block.x, i / block.block.x % block.block.y,
                    i / (block.block.x * block.block.y));
    f.done = false;
    f.fake_stack = nullptr;
    f.copies.clear();
    f.groups = 0;
    if (!f.stack) f.stack.reset(new char[kStack]);
    forget_frames(f.stack.get());
    begin_at(f.place, f.stack.get(), kStack, run_fiber);
    set_ready(block, f);
    ++block.warps[i / kWarp].alive;
  }
  while (block.alive > 0) {
    Fiber* next = first_ready(block);
    if (next == nullptr) {
      std::fprintf(stderr, "shim: deadlock, a barrier was not reached by every thread\n");
      std::abort();
    }
    block.current = next;
    enter(&block.fake_stack, next->stack.get(), kStack);
    races::run(static_cast<int>(next->index), next->stack.get(), kStack);
    change(block.scheduler, next->place);
    races::run(-1, nullptr, 0);
    entered(block.fake_stack, nullptr, nullptr);
    block.ready[next->rank / 64] &= ~(uint64_t{1} << next->rank % 64);
    release(block, *next);
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
  const int per_register = depth / 8;
  for (int i = 0; i < per_register; ++i) {
    for (int pair = 0; pair < 2; ++pair) {
      const int k = pair * (depth / 2) + lane % 4 * per_register + i;
      for (int half = 0; half < 2; ++half) {
        warp.left[lane / 4 + 8 * half][k] = number(a[half + 2 * pair], i);
      }
      warp.right[lane / 4][k] = number(b[pair], i);
    }
  }
  sync_warp();
  for (int i = 0; i < 4; ++i) {
    const float* row = warp.left[lane / 4 + i / 2 * 8];
    const float* column = warp.right[lane % 4 * 2 + i % 2];
    for (int k = 0; k < depth; ++k) c[i] += row[k] * column[k];
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
  warp.one[lane()] = a;
  warp.other[lane()] = b;
  sync_warp();
  for (unsigned k = 0; k < 4; ++k) {
    for (unsigned i = 0; i < 2; ++i) {
      sum[i] = std::fma(warp.one[4 * row + k], warp.other[4 * (column + i) + k], sum[i]);
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
