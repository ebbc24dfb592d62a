// Finds races in kernels that run on the host shim, as compute-sanitizer's racecheck does for the
// shared memory of a GPU, and for global memory, for asynchronous copies and for kernels that
// overlap as well.
//
// g++ -fsanitize=thread calls __tsan_read4 and its like before every access; here they are
// answered by what CUDA promises instead of by ThreadSanitizer. Two accesses of a byte, one of
// them a write, must be ordered by one of:
//   * the program, where one thread does both;
//   * __syncthreads between threads of a block, __syncwarp between those of a warp. Shuffles and
//     mma order nothing: they say nothing of memory;
//   * between blocks, __threadfence, an atomic that arrives, an atomic that sees it, __threadfence.
//     The first fence is the writer's own, or that of the thread that arrives, once a barrier has
//     ordered it behind the write; what lane 0 saw may reach the warp by a shuffle;
//   * between kernels, the stream, or wait_for_previous_kernel() where they may overlap. Every
//     thread that touches the memory must have called it.
// That is a property of the program, not of the order it was run in; still only what a case
// executes is looked at. A race ends the process with code 5.
#include "races.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>
#include <vector>

// Statics of the program, __shared__ variables among them, lie between these two.
extern char __data_start, _end;

namespace races {
namespace {

constexpr unsigned kWarp = 32;

struct Access {
  uint8_t bytes;  // of the eight of a cell
  bool write, atomic, flying;
  unsigned launch, block, thread, block_epoch, warp_epoch;
  uint64_t time;
  const void* code;
};

struct Cell {
  std::vector<Access> writes, reads;
  unsigned ordered_until = 0;
};

struct Moment {
  uint64_t time = 0;
  unsigned block_epoch = 0, warp_epoch = 0;
};

// An atomic: whoever sees it sees what was fenced before it.
struct Release {
  unsigned block, thread;
  Moment at, fence;  // the thread's last one
};

struct Thread {
  int quiet = 0;
  bool waited = false;
  Moment fence;
  std::vector<Release> seen, acquired;
};

std::unordered_map<uintptr_t, Cell> cells;
std::unordered_map<const void*, std::vector<Release>> releases;
// When a thread of the launch has fenced, by its block and its number.
std::unordered_map<uint64_t, std::vector<uint64_t>> fences;
std::vector<Thread> threads;
std::vector<unsigned> warp_epochs;
unsigned launch = 0, block = 0, block_epoch = 0;
// Kernels from this one on may still run beside the present one.
unsigned overlapped_since = 1;
bool overlapped = false, some_waited = false;
uint64_t now = 0;
int current = -1;
const char *stack_begin = nullptr, *stack_end = nullptr;
const char *shared_begin = nullptr, *shared_end = nullptr;

bool is_shared(uintptr_t address) {
  const char* at = reinterpret_cast<const char*>(address);
  return (at >= &__data_start && at < &_end) || (at >= shared_begin && at < shared_end);
}

bool comes_before(const Access& a, unsigned thread, const Moment& moment) {
  return a.time <= moment.time &&
         (a.thread == thread || a.block_epoch < moment.block_epoch ||
          (a.thread / kWarp == thread / kWarp && a.warp_epoch < moment.warp_epoch));
}

Moment present() { return {now, block_epoch, warp_epochs[current / kWarp]}; }

uint64_t key_of(unsigned of_block, unsigned thread) { return uint64_t{of_block} << 32 | thread; }

bool is_released(const Access& a, const Release& r) {
  if (r.block != a.block || !comes_before(a, r.thread, r.at)) return false;
  // One atomic is before the next; and a fence of its own, or one that came after a barrier.
  if (a.atomic && a.time == r.at.time) return true;
  for (const uint64_t time : fences[key_of(a.block, a.thread)]) {
    if (time > a.time && time <= r.at.time) return true;
  }
  return comes_before(a, r.thread, r.fence);
}

bool ordered(const Access& a) {
  const Thread& me = threads[current];
  if (a.launch != launch) return a.launch < overlapped_since || me.waited;
  if (a.block == block) return comes_before(a, current, present());
  for (const Release& r : me.acquired) {
    if (is_released(a, r)) return true;
  }
  return false;
}

const char* kind(const Access& a) {
  return a.flying   ? "is being written by a copy of"
         : a.atomic ? "is counted up by"
         : a.write  ? "is written by"
                    : "is read by";
}

void describe(const Access& a) {
  std::fprintf(stderr, "  %s thread %u of block %u in launch %u, at %p\n", kind(a), a.thread,
               a.block, a.launch, a.code);
}

[[noreturn]] void report(uintptr_t address, const Access& before, const Access& after) {
  std::fprintf(stderr, "race: 8 bytes of %s memory at %p, nothing in between\n",
               is_shared(address) ? "shared" : "global", reinterpret_cast<void*>(address));
  describe(before);
  describe(after);
  std::_Exit(5);
}

// Of accesses that are in order the last is enough: what comes after it comes after the others.
void forget_ordered(std::vector<Access>& accesses, const Access& now_at) {
  size_t kept = 0;
  for (const Access& a : accesses) {
    if (a.flying || (a.bytes & ~now_at.bytes) || !ordered(a)) accesses[kept++] = a;
  }
  accesses.resize(kept);
}

void touch_cell(uintptr_t address, Access a) {
  const bool shared = is_shared(address);
  Cell& cell = cells[address];
  if (cell.ordered_until < overlapped_since) {
    // What came before the kernels that may still run is over.
    for (std::vector<Access>* accesses : {&cell.writes, &cell.reads}) {
      size_t kept = 0;
      for (const Access& old : *accesses) {
        if (old.launch >= overlapped_since) (*accesses)[kept++] = old;
      }
      accesses->resize(kept);
    }
    cell.ordered_until = overlapped_since;
  }
  const auto collides = [&](const Access& old) {
    if (!(old.bytes & a.bytes) || (old.atomic && a.atomic)) return false;
    if (shared && (old.launch != launch || old.block != block)) return false;
    // Not even the thread that copies may look before it has waited.
    return old.flying || !ordered(old);
  };
  for (const Access& old : cell.writes) {
    if (collides(old)) report(address, old, a);
  }
  if (a.write) {
    for (const Access& old : cell.reads) {
      if (collides(old)) report(address, old, a);
    }
    forget_ordered(cell.reads, a);
    if (!a.atomic) forget_ordered(cell.writes, a);
    cell.writes.push_back(a);
    return;
  }
  if (!cell.reads.empty()) {
    Access& last = cell.reads.back();
    if (last.launch == launch && last.block == block && last.thread == a.thread &&
        !(last.bytes & ~a.bytes)) {
      last = a;
      return;
    }
  }
  cell.reads.push_back(a);
}

void touch(const void* address, size_t size, bool write, const void* code, bool atomically = false,
           bool flying = false) {
  if (current < 0 || size == 0 || (threads[current].quiet && code != nullptr)) return;
  const char* at = static_cast<const char*>(address);
  if (at >= stack_begin && at < stack_end) return;
  ++now;
  const uintptr_t first = reinterpret_cast<uintptr_t>(address), end = first + size;
  for (uintptr_t cell = first & ~uintptr_t{7}; cell < end; cell += 8) {
    const unsigned from = cell < first ? first - cell : 0, to = end - cell < 8 ? end - cell : 8;
    const uint8_t bytes = static_cast<uint8_t>((0xff << from) & (0xff >> (8 - to)));
    touch_cell(cell,
               {bytes, write, atomically, flying, launch, block, static_cast<unsigned>(current),
                block_epoch, warp_epochs[current / kWarp], now, code});
  }
}

}  // namespace

void start_launch(bool may_overlap) {
  ++launch;
  overlapped = may_overlap;
  some_waited = false;
  // A kernel that starts before those in front of it have ended lets the one after it start, too.
  if (!overlapped) overlapped_since = launch;
  releases.clear();
  fences.clear();
}

void end_launch() {
  if (!overlapped || some_waited) return;
  std::fprintf(stderr, "race: no thread of launch %u waited for the kernel in front\n", launch);
  std::_Exit(5);
}

void start_block(unsigned index, unsigned count, const void* shared, size_t bytes) {
  block = index;
  block_epoch = 0;
  threads.assign(count, Thread());
  warp_epochs.assign((count + kWarp - 1) / kWarp, 0);
  shared_begin = static_cast<const char*>(shared);
  shared_end = shared_begin + bytes;
}

void run(int thread, const void* stack, size_t bytes) {
  current = thread;
  stack_begin = static_cast<const char*>(stack);
  stack_end = stack_begin + bytes;
}

void block_barrier() { ++block_epoch; }

void warp_barrier(unsigned warp) {
  ++warp_epochs[warp];
  shuffle(warp);
}

void shuffle(unsigned warp) {
  const size_t begin = warp * kWarp;
  const size_t end = begin + kWarp < threads.size() ? begin + kWarp : threads.size();
  std::vector<Release> seen;
  for (size_t i = begin; i < end; ++i) {
    if (threads[i].seen.size() > seen.size()) seen = threads[i].seen;
  }
  if (seen.empty()) return;
  for (size_t i = begin; i < end; ++i) threads[i].seen = seen;
}

void fence() {
  Thread& me = threads[current];
  ++now;
  me.fence = present();
  fences[key_of(block, current)].push_back(now);
  me.acquired.insert(me.acquired.end(), me.seen.begin(), me.seen.end());
  me.seen.clear();
}

void atomic(void* address, size_t size) {
  Thread& me = threads[current];
  std::vector<Release>& known = releases[address];
  me.seen = known;
  touch(address, size, true, nullptr, true);
  known.push_back({block, static_cast<unsigned>(current), present(), me.fence});
}

void waited_for_previous_kernel() {
  threads[current].waited = true;
  some_waited = true;
}

void copy_started(void* to, size_t size, const void* from, size_t read) {
  touch(from, read, false, nullptr);
  touch(to, size, true, nullptr, false, true);
}

void copy_arrived(void* to, size_t size, const void* from, size_t read) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(to);
  for (uintptr_t cell = first & ~uintptr_t{7}; cell < first + size; cell += 8) {
    std::vector<Access>& writes = cells[cell].writes;
    size_t kept = 0;
    for (const Access& a : writes) {
      if (!a.flying || a.thread != static_cast<unsigned>(current)) writes[kept++] = a;
    }
    writes.resize(kept);
  }
  touch(from, read, false, nullptr);
  touch(to, size, true, nullptr);
}

Quiet::Quiet() : thread_(current) {
  if (thread_ >= 0) ++threads[thread_].quiet;
}
Quiet::~Quiet() {
  if (thread_ >= 0) --threads[thread_].quiet;
}

}  // namespace races

// What g++ calls. The accesses of more than 8 bytes and those of unknown alignment are the same.
#define COACHHOOK_ACCESS(name, write, size)                          \
  void __tsan_##name(void* address) {                                \
    races::touch(address, size, write, __builtin_return_address(0)); \
  }
#define COACHHOOK_ACCESSES(size)                      \
  COACHHOOK_ACCESS(read##size, false, size)           \
  COACHHOOK_ACCESS(write##size, true, size)           \
  COACHHOOK_ACCESS(unaligned_read##size, false, size) \
  COACHHOOK_ACCESS(unaligned_write##size, true, size)
extern "C" {
COACHHOOK_ACCESSES(1)
COACHHOOK_ACCESSES(2)
COACHHOOK_ACCESSES(4)
COACHHOOK_ACCESSES(8)
COACHHOOK_ACCESSES(16)
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_read_range(void* address, size_t size) {
  races::touch(address, size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
  races::touch(address, size, true, __builtin_return_address(0));
}
}
