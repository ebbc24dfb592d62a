// A race detector for kernels that run on the host shim, see races.cpp.
#pragma once

#include <cstddef>

namespace races {

// The launches of a stream, and the blocks of a launch, in the order they are run in. `shared` is
// the dynamic shared memory of the block.
void start_launch(bool overlapped);
void end_launch();
void start_block(unsigned index, unsigned threads, const void* shared, size_t bytes);

// Which thread runs from here on, with its stack; -1: none of the kernel's.
void run(int thread, const void* stack, size_t bytes);

void block_barrier();
void warp_barrier(unsigned warp);
void shuffle(unsigned warp);
void fence();
void atomic(void* address, size_t size);
void waited_for_previous_kernel();
void copy_started(void* to, size_t size, const void* from, size_t read);
void copy_arrived(void* to, size_t size, const void* from, size_t read);

// While one lives, what the running thread does is the shim's business.
struct Quiet {
  Quiet();
  ~Quiet();
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;

 private:
  int thread_;
};

}  // namespace races
