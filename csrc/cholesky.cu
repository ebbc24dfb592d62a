// Host side of the Cholesky update: checks, choice of the template instance, launches.
#include "cholesky.cuh"

#include <cstdint>

#include "cholesky_solve.cuh"

namespace coachhook {
namespace {

constexpr const char* kInvertOp = "cholesky_invert";
constexpr const char* kSolveOp = "cholesky_solve";
constexpr const char* kRotationsOp = "cholesky_rotations";
constexpr const char* kApplyOp = "cholesky_apply";
constexpr int64_t kMaxRows = int64_t{1} << 20;  // blocks of rows are a second grid dimension

Status check(const InverseParams& p) {
  COACHHOOK_REQUIRE(p.n >= 1 && p.n <= kMaxRows, kInvertOp, "n", "from 1 to 2^20", p.n);
  COACHHOOK_REQUIRE(p.rows >= kInverseWidth && (p.rows & (p.rows - 1)) == 0 && p.rows <= kMaxRows,
                    kInvertOp, "rows", "a power of two from 64 to 2^20", p.rows);
  COACHHOOK_REQUIRE(p.factor && p.inverses && p.scratch && p.arrivals, kInvertOp,
                    "factor, inverses, scratch and arrivals", "non-null pointers", 0);
  return Status();
}

Status check(const SolveParams& p) {
  COACHHOOK_REQUIRE(p.n >= 1 && p.n <= kMaxRows, kSolveOp, "n", "from 1 to 2^20", p.n);
  COACHHOOK_REQUIRE(p.rows >= kInverseWidth && p.rows % kInverseWidth == 0 && p.rows <= kMaxRows,
                    kSolveOp, "rows", "a multiple of 64, at most 2^20", p.rows);
  COACHHOOK_REQUIRE(p.columns == 32 || p.columns == 64, kSolveOp, "columns", "32 or 64", p.columns);
  COACHHOOK_REQUIRE(!(p.keep && p.transposed), kSolveOp, "keep", "false where transposed", 1);
  COACHHOOK_REQUIRE(p.workers >= 1 && p.workers <= kMaxRows, kSolveOp, "workers", "from 1 to 2^20",
                    p.workers);
  COACHHOOK_REQUIRE(p.factor && p.inverses && p.right && p.residuals && p.solved, kSolveOp,
                    "factor, inverses, right, residuals and solved", "non-null pointers", 0);
  COACHHOOK_REQUIRE(p.partial && p.arrivals, kSolveOp, "partial and arrivals", "non-null pointers",
                    0);
  return Status();
}

Status check(const RotationParams& p) {
  COACHHOOK_REQUIRE(p.n >= 1 && p.n <= kMaxRows, kRotationsOp, "n", "from 1 to 2^20", p.n);
  COACHHOOK_REQUIRE(p.columns == 32 || p.columns == 64, kRotationsOp, "columns", "32 or 64",
                    p.columns);
  COACHHOOK_REQUIRE(p.keys >= 1 && p.keys <= p.columns, kRotationsOp, "keys", "from 1 to columns",
                    p.keys);
  COACHHOOK_REQUIRE(p.sign == 1 || p.sign == -1, kRotationsOp, "sign", "1 or -1", p.sign);
  COACHHOOK_REQUIRE(p.solved && p.sums && p.factor && p.rotations && p.status, kRotationsOp,
                    "solved, sums, factor, rotations and status", "non-null pointers", 0);
  return Status();
}

Status check(const ApplyParams& p) {
  COACHHOOK_REQUIRE(p.n >= 1 && p.n <= kMaxRows, kApplyOp, "n", "from 1 to 2^20", p.n);
  COACHHOOK_REQUIRE(p.columns == 32 || p.columns == 64, kApplyOp, "columns", "32 or 64", p.columns);
  COACHHOOK_REQUIRE(p.chunk >= kPanelWidth && p.chunk % kPanelWidth == 0, kApplyOp, "chunk",
                    "a positive multiple of 32", p.chunk);
  COACHHOOK_REQUIRE(p.factor && p.residuals && p.solved && p.rotations && p.status, kApplyOp,
                    "factor, residuals, solved, rotations and status", "non-null pointers", 0);
  return Status();
}

// The layout of a matrix that allows for accesses of 16 bytes along rows, or of so many down
// columns; or kAny.
template <typename T>
Layout layout_of(size_t down_columns, const void* matrix, int64_t row_stride,
                 int64_t column_stride) {
  const auto aligned = [matrix](int64_t unit, int64_t stride, size_t bytes) {
    return unit == 1 && reinterpret_cast<uintptr_t>(matrix) % bytes == 0 &&
           stride * sizeof(T) % bytes == 0;
  };
  if (aligned(column_stride, row_stride, sizeof(Chunk<T>))) return Layout::kRows;
  return aligned(row_stride, column_stride, down_columns) ? Layout::kColumns : Layout::kAny;
}

// Steps that a block holds at once: four where the device's shared memory takes them.
template <typename T, int kColumns>
int stages_on(int device) {
  using Traits = NarrowTraits<T, kColumns>;
  int shared = 0;
  if (cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
      cudaSuccess) {
    return 2;
  }
  for (int stages = 4; stages > 2; --stages) {
    if (Traits::shared_bytes(stages) <= shared) return stages;
  }
  return 2;
}

template <typename T, Layout kLayout>
Status launch_doubling(const InverseParams& p, int64_t size, bool second, cudaStream_t stream) {
  using Traits = NarrowTraits<T, 64>;
  const unsigned tiles = static_cast<unsigned>(size / kTileRows);
  const dim3 grid(tiles, tiles, static_cast<unsigned>(ceil_div(p.n - size, 2 * size)));
  const int stages = stages_on<T, 64>(p.device), bytes = Traits::shared_bytes(stages);
  const cudaError_t error = allow_shared(double_inverses_kernel<T, kLayout>, bytes);
  if (error != cudaSuccess) return cuda_error(kInvertOp, "cudaFuncSetAttribute", error);
  COACHHOOK_LAUNCH_SHARED((double_inverses_kernel<T, kLayout>), grid, dim3(Traits::kThreads), bytes,
                          stream, p, static_cast<int>(size), second, stages);
  return launched(kInvertOp, "double_inverses_kernel");
}

template <typename T>
Status launch_doubling(const InverseParams& p, int64_t size, cudaStream_t stream) {
  Status status;
  switch (layout_of<T>(sizeof(Chunk<T>), p.factor, p.row_stride, p.column_stride)) {
    case Layout::kRows:
      status = launch_doubling<T, Layout::kRows>(p, size, false, stream);
      break;
    case Layout::kColumns:
      status = launch_doubling<T, Layout::kColumns>(p, size, false, stream);
      break;
    case Layout::kAny:
      status = launch_doubling<T, Layout::kAny>(p, size, false, stream);
      break;
  }
  return status.ok() ? launch_doubling<T, Layout::kRows>(p, size, true, stream) : status;
}

template <typename T>
Status launch_invert(const InverseParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.n, kInverseWidth)),
                  static_cast<unsigned>(p.rows / kInverseWidth));
  COACHHOOK_LAUNCH(invert_diagonal_kernel<T>, grid, dim3(InverseTraits::kThreads), stream, p);
  Status status = launched(kInvertOp, "invert_diagonal_kernel");
  for (int64_t size = kInverseWidth; status.ok() && size < p.rows && size < p.n; size *= 2) {
    status = launch_doubling<T>(p, size, stream);
  }
  return status;
}

template <typename T, int kColumns, Layout kLayout>
Status launch_product(const NarrowProduct& p, int64_t workers, cudaStream_t stream) {
  using Traits = NarrowTraits<T, kColumns>;
  const int64_t steps = steps_before(p, static_cast<int>(ceil_div(p.m, kTileRows)));
  const dim3 grid(static_cast<unsigned>(steps < workers ? steps : workers));
  const int bytes = Traits::shared_bytes(p.stages);
  const cudaError_t error = allow_shared(narrow_product_kernel<T, kColumns, kLayout>, bytes);
  if (error != cudaSuccess) return cuda_error(kSolveOp, "cudaFuncSetAttribute", error);
  COACHHOOK_LAUNCH_SHARED((narrow_product_kernel<T, kColumns, kLayout>), grid,
                          dim3(Traits::kThreads), bytes, stream, p);
  return launched(kSolveOp, "narrow_product_kernel");
}

template <typename T, int kColumns>
Status launch_product(const NarrowProduct& p, int64_t workers, cudaStream_t stream) {
  switch (layout_of<T>(sizeof(Chunk<T>), p.a, p.row_stride, p.column_stride)) {
    case Layout::kRows:
      return launch_product<T, kColumns, Layout::kRows>(p, workers, stream);
    case Layout::kColumns:
      return launch_product<T, kColumns, Layout::kColumns>(p, workers, stream);
    case Layout::kAny:
      break;
  }
  return launch_product<T, kColumns, Layout::kAny>(p, workers, stream);
}

template <typename T, int kColumns>
Status launch_solve(const SolveParams& p, cudaStream_t stream) {
  const T* factor = static_cast<const T*>(p.factor);
  T* solved = static_cast<T*>(p.solved);
  const int stages = stages_on<T, kColumns>(p.device);
  const int64_t blocks = ceil_div(p.n, p.rows);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t j = p.transposed ? blocks - 1 - i : i;
    const int64_t first = j * p.rows, last = first + p.rows < p.n ? first + p.rows : p.n;
    T* residual = static_cast<T*>(p.residuals) + (p.keep ? j * p.n * kColumns : 0);
    const T* right = i == 0 ? static_cast<const T*>(p.right) : residual;

    NarrowProduct own;
    own.m = own.k = static_cast<int>(last - first);
    own.shape = p.transposed ? Shape::kUpper : Shape::kLower;
    own.a = static_cast<const T*>(p.inverses) + j * p.rows * (p.rows + 1);
    own.row_stride = p.transposed ? 1 : p.rows;
    own.column_stride = p.transposed ? p.rows : 1;
    own.b = right + first * kColumns;
    own.b_stride = kColumns;
    own.out = solved + first * kColumns;
    own.partial = p.partial;
    own.arrivals = p.arrivals;
    own.stages = stages;
    Status status = launch_product<T, kColumns>(own, p.workers, stream);
    if (!status.ok()) return status;

    NarrowProduct rest = own;
    rest.m = static_cast<int>(p.transposed ? first : p.n - last);
    if (rest.m == 0) continue;
    rest.sign = -1;
    rest.shape = Shape::kFull;
    rest.a = factor +
             (p.transposed ? first * p.row_stride : last * p.row_stride + first * p.column_stride);
    rest.row_stride = p.transposed ? p.column_stride : p.row_stride;
    rest.column_stride = p.transposed ? p.row_stride : p.column_stride;
    rest.b = own.out;
    const int64_t left = p.transposed ? 0 : last * kColumns;
    rest.base = right + left;
    rest.out = residual + left + (p.keep ? p.n * kColumns : 0);
    status = launch_product<T, kColumns>(rest, p.workers, stream);
    if (!status.ok()) return status;
  }
  return Status();
}

template <typename T>
Status launch_solve(const SolveParams& p, cudaStream_t stream) {
  return p.columns == 32 ? launch_solve<T, 32>(p, stream) : launch_solve<T, 64>(p, stream);
}

template <typename T, int kColumns>
Status launch_rotations(const RotationParams& p, cudaStream_t stream) {
  const int64_t panels = ceil_div(p.n, kPanelWidth);
  constexpr int kElements = kColumns * kColumns;
  const dim3 prefix_grid(static_cast<unsigned>(ceil_div(kElements, PrefixTraits::kThreads)));
  COACHHOOK_LAUNCH(prefix_sums_kernel<T>, prefix_grid, dim3(PrefixTraits::kThreads), stream,
                   static_cast<T*>(p.sums), panels, kElements);
  const Status status = launched(kRotationsOp, "prefix_sums_kernel");
  if (!status.ok()) return status;

  using Traits = PanelTraits<kColumns>;
  const bool paired = Traits::kPaired && panels > 1;
  const dim3 grid(static_cast<unsigned>(panels + Traits::kIdentities + paired));
  COACHHOOK_LAUNCH((panel_rotations_kernel<T, kColumns>), grid, dim3(Traits::kThreads), stream, p);
  return launched(kRotationsOp, "panel_rotations_kernel");
}

template <typename T>
Status launch_rotations(const RotationParams& p, cudaStream_t stream) {
  return p.columns == 32 ? launch_rotations<T, 32>(p, stream) : launch_rotations<T, 64>(p, stream);
}

template <typename T, int kColumns>
Status launch_apply(const ApplyParams& p, cudaStream_t stream) {
  using Traits = ApplyTraits<T, kColumns>;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.n, p.chunk)),
                  static_cast<unsigned>(ceil_div(p.n, Traits::kRows)));
  const dim3 block(Traits::kThreads);
  switch (layout_of<T>(sizeof(Pair<T>), p.factor, p.row_stride, p.column_stride)) {
    case Layout::kRows:
      COACHHOOK_LAUNCH((apply_rotations_kernel<T, kColumns, Layout::kRows>), grid, block, stream,
                       p);
      break;
    case Layout::kColumns:
      COACHHOOK_LAUNCH((apply_rotations_kernel<T, kColumns, Layout::kColumns>), grid, block, stream,
                       p);
      break;
    case Layout::kAny:
      COACHHOOK_LAUNCH((apply_rotations_kernel<T, kColumns, Layout::kAny>), grid, block, stream, p);
      break;
  }
  return launched(kApplyOp, "apply_rotations_kernel");
}

template <typename T>
Status launch_apply(const ApplyParams& p, cudaStream_t stream) {
  return p.columns == 32 ? launch_apply<T, 32>(p, stream) : launch_apply<T, 64>(p, stream);
}

}  // namespace

Status cholesky_invert(const InverseParams& p) {
  const Status checked = check(p);
  if (!checked.ok()) return checked;
  const DeviceGuard guard(p.device);
  if (guard.error() != cudaSuccess) return cuda_error(kInvertOp, "cudaSetDevice", guard.error());
  const cudaStream_t stream = static_cast<cudaStream_t>(p.stream);
  return p.real == Real::kFloat64 ? launch_invert<double>(p, stream)
                                  : launch_invert<float>(p, stream);
}

Status cholesky_solve(const SolveParams& p) {
  const Status checked = check(p);
  if (!checked.ok()) return checked;
  const DeviceGuard guard(p.device);
  if (guard.error() != cudaSuccess) return cuda_error(kSolveOp, "cudaSetDevice", guard.error());
  const cudaStream_t stream = static_cast<cudaStream_t>(p.stream);
  return p.real == Real::kFloat64 ? launch_solve<double>(p, stream)
                                  : launch_solve<float>(p, stream);
}

Status cholesky_rotations(const RotationParams& p) {
  const Status checked = check(p);
  if (!checked.ok()) return checked;
  const DeviceGuard guard(p.device);
  if (guard.error() != cudaSuccess) return cuda_error(kRotationsOp, "cudaSetDevice", guard.error());
  const cudaStream_t stream = static_cast<cudaStream_t>(p.stream);
  return p.real == Real::kFloat64 ? launch_rotations<double>(p, stream)
                                  : launch_rotations<float>(p, stream);
}

Status cholesky_apply(const ApplyParams& p) {
  const Status checked = check(p);
  if (!checked.ok()) return checked;
  const DeviceGuard guard(p.device);
  if (guard.error() != cudaSuccess) return cuda_error(kApplyOp, "cudaSetDevice", guard.error());
  const cudaStream_t stream = static_cast<cudaStream_t>(p.stream);
  return p.real == Real::kFloat64 ? launch_apply<double>(p, stream)
                                  : launch_apply<float>(p, stream);
}

}  // namespace coachhook
