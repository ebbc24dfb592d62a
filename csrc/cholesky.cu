// Host side of the Cholesky update: checks, choice of the template instance, launches.
#include "cholesky.cuh"

#include <cstdint>

namespace coachhook {
namespace {

constexpr const char* kInvertOp = "cholesky_invert";
constexpr const char* kRotationsOp = "cholesky_rotations";
constexpr const char* kApplyOp = "cholesky_apply";
constexpr int64_t kMaxRows = int64_t{1} << 20;  // blocks of rows are a second grid dimension

Status check(const InverseParams& p) {
  COACHHOOK_REQUIRE(p.n >= 1 && p.n <= kMaxRows, kInvertOp, "n", "from 1 to 2^20", p.n);
  COACHHOOK_REQUIRE(p.rows >= kInverseWidth && p.rows % kInverseWidth == 0 && p.rows <= kMaxRows,
                    kInvertOp, "rows", "a multiple of 64, at most 2^20", p.rows);
  COACHHOOK_REQUIRE(p.factor && p.inverses, kInvertOp, "factor and inverses", "non-null pointers",
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

template <typename T>
Status launch_invert(const InverseParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.n, kInverseWidth)),
                  static_cast<unsigned>(p.rows / kInverseWidth));
  COACHHOOK_LAUNCH(invert_diagonal_kernel<T>, grid, dim3(InverseTraits::kThreads), stream, p);
  return launched(kInvertOp, "invert_diagonal_kernel");
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

  const dim3 grid(static_cast<unsigned>(panels + PanelTraits<kColumns>::kIdentities));
  COACHHOOK_LAUNCH((panel_rotations_kernel<T, kColumns>), grid,
                   dim3(PanelTraits<kColumns>::kThreads), stream, p);
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
  const auto aligned = [&p](int64_t unit, int64_t stride, size_t bytes) {
    return unit == 1 && reinterpret_cast<uintptr_t>(p.factor) % bytes == 0 &&
           stride * sizeof(T) % bytes == 0;
  };
  if (aligned(p.column_stride, p.row_stride, sizeof(Chunk<T>))) {
    COACHHOOK_LAUNCH((apply_rotations_kernel<T, kColumns, Layout::kRows>), grid, block, stream, p);
  } else if (aligned(p.row_stride, p.column_stride, sizeof(Pair<T>))) {
    COACHHOOK_LAUNCH((apply_rotations_kernel<T, kColumns, Layout::kColumns>), grid, block, stream,
                     p);
  } else {
    COACHHOOK_LAUNCH((apply_rotations_kernel<T, kColumns, Layout::kAny>), grid, block, stream, p);
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
