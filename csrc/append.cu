// The launch that an append needs beside its graph.
#include "append.h"

#include "common/launch.cuh"

namespace coachhook {
namespace {

constexpr const char* kOp = "load_batch";
constexpr int kTile = 32;
constexpr int kLines = 8;  // of a tile at a time
constexpr int64_t kMostRows = int64_t{1} << 30;

// blockIdx.x is a tile of rows of X, blockIdx.y one of its columns; blockIdx.z is 0 for the keys.
template <typename T>
__global__ void __launch_bounds__(kTile* kLines) load_batch_kernel(const BatchParams p) {
  __shared__ T tile[kTile][kTile + 1];
  const Columns& x = blockIdx.z == 0 ? p.keys : p.targets;
  const int64_t row0 = int64_t{blockIdx.x} * kTile, column0 = int64_t{blockIdx.y} * kTile;
  const int lane = threadIdx.x % kTile, line = threadIdx.x / kTile;
  if (blockIdx.x + blockIdx.y + blockIdx.z + threadIdx.x == 0) *p.at = p.row;
  if (row0 >= x.length) return;

  // Neighbouring lanes read neighbouring numbers, of rows or of columns.
  const bool across = x.column_stride == 1;
#pragma unroll
  for (int i = 0; i < kTile; i += kLines) {
    const int r = across ? line + i : lane, c = across ? lane : line + i;
    const int64_t row = row0 + r, column = column0 + c;
    const bool inside = row < x.length && column < p.columns;
    tile[r][c] = inside
                     ? static_cast<const T*>(x.from)[row * x.row_stride + column * x.column_stride]
                     : T(0);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTile; i += kLines) {
    const int64_t row = row0 + lane, column = column0 + line + i;
    if (row < x.length && column < p.size) {
      static_cast<T*>(x.by_row)[column * x.length + row] = tile[lane][line + i];
    }
  }
  if (x.by_column == nullptr) return;
#pragma unroll
  for (int i = 0; i < kTile; i += kLines) {
    const int64_t row = row0 + line + i, column = column0 + lane;
    if (row < x.length && column < p.size) {
      static_cast<T*>(x.by_column)[row * p.size + column] = tile[line + i][lane];
    }
  }
}

Status check(const BatchParams& p) {
  COACHHOOK_REQUIRE(p.columns >= 1 && p.columns <= p.size, kOp, "columns", "from 1 to size",
                    p.columns);
  COACHHOOK_REQUIRE(p.size <= kMostRows, kOp, "size", "at most 2^30", p.size);
  for (const Columns* x : {&p.keys, &p.targets}) {
    COACHHOOK_REQUIRE(x->length >= 1 && x->length <= kMostRows, kOp, "length", "from 1 to 2^30",
                      x->length);
    COACHHOOK_REQUIRE(x->from && x->by_row, kOp, "from and by_row", "non-null pointers", 0);
  }
  COACHHOOK_REQUIRE(p.at, kOp, "at", "a non-null pointer", 0);
  return Status();
}

template <typename T>
Status launch(const BatchParams& p, cudaStream_t stream) {
  const int64_t longest = p.keys.length > p.targets.length ? p.keys.length : p.targets.length;
  const dim3 grid(static_cast<unsigned>(ceil_div(longest, kTile)),
                  static_cast<unsigned>(ceil_div(p.size, kTile)), 2);
  COACHHOOK_LAUNCH(load_batch_kernel<T>, grid, dim3(kTile * kLines), stream, p);
  return launched(kOp, "load_batch_kernel");
}

}  // namespace

Status load_batch(const BatchParams& p) {
  const Status checked = check(p);
  if (!checked.ok()) return checked;
  const DeviceGuard guard(p.device);
  if (guard.error() != cudaSuccess) return cuda_error(kOp, "cudaSetDevice", guard.error());
  const cudaStream_t stream = static_cast<cudaStream_t>(p.stream);
  return p.real == Real::kFloat64 ? launch<double>(p, stream) : launch<float>(p, stream);
}

}  // namespace coachhook
