// Host side of the gate: checks, choice of the template instance, launches.
#include "gate.cuh"

#include <cstdint>

namespace coachhook {
namespace {

constexpr const char* kGateOp = "row_norm_zscore_gate";
constexpr const char* kCorrectionOp = "add_correction";

Status check(const GateParams& p) {
  COACHHOOK_REQUIRE(p.rows >= 0, kGateOp, "rows", ">= 0", p.rows);
  COACHHOOK_REQUIRE(p.rank >= 0, kGateOp, "rank", ">= 0", p.rank);
  COACHHOOK_REQUIRE(p.rank >= 1 || p.reduction == Reduction::kNorm, kGateOp, "rank",
                    ">= 1 with reduction=max", p.rank);
  COACHHOOK_REQUIRE(p.row_stride >= p.rank || p.rows <= 1, kGateOp, "row_stride", ">= rank",
                    p.row_stride);
  COACHHOOK_REQUIRE(p.sequences >= 0, kGateOp, "sequences", ">= 0", p.sequences);
  COACHHOOK_REQUIRE(p.sequences <= kMaxGrid, kGateOp, "sequences", "< 2^31", p.sequences);
  COACHHOOK_REQUIRE(ceil_div(p.rows, RowTraits::kRows) <= kMaxGrid, kGateOp, "rows", "< 2^34",
                    p.rows);
  if (p.cu_seqlens == nullptr) {
    COACHHOOK_REQUIRE(p.sequences > 0 ? p.rows % p.sequences == 0 : p.rows == 0, kGateOp, "rows",
                      "a multiple of sequences without cu_seqlens", p.rows);
  } else {
    COACHHOOK_REQUIRE(p.rows <= INT32_MAX, kGateOp, "rows", "< 2^31 with int32 cu_seqlens", p.rows);
  }
  if (p.rows > 0) {
    COACHHOOK_REQUIRE((p.coefficients || p.rank == 0) && p.magnitude && p.z && p.fired, kGateOp,
                      "coefficients, magnitude, z and fired", "non-null pointers", 0);
  }
  if (p.scope == Scope::kPopulation) {
    COACHHOOK_REQUIRE(p.mean && p.std, kGateOp, "mean and std",
                      "non-null pointers with scope=population", 0);
  }
  COACHHOOK_REQUIRE(p.scope <= Scope::kDirect, kGateOp, "scope", "sequence, population or direct",
                    static_cast<int>(p.scope));
  COACHHOOK_REQUIRE(p.state == nullptr || p.scope == Scope::kSequence, kGateOp, "state",
                    "null unless scope=sequence", 1);
  return Status();
}

Status check(const CorrectionParams& p) {
  COACHHOOK_REQUIRE(p.rows >= 0, kCorrectionOp, "rows", ">= 0", p.rows);
  COACHHOOK_REQUIRE(p.out_features >= 0, kCorrectionOp, "out_features", ">= 0", p.out_features);
  COACHHOOK_REQUIRE(ceil_div(p.out_features, CorrectionTraits::kOutputs) <= kMaxGrid, kCorrectionOp,
                    "out_features", "< 2^34", p.out_features);
  COACHHOOK_REQUIRE(p.rank >= 0, kCorrectionOp, "rank", ">= 0", p.rank);
  if (p.rows > 0 && p.out_features > 0) {
    COACHHOOK_REQUIRE(p.y && p.fired && (p.rank == 0 || (p.q && p.s)), kCorrectionOp,
                      "y, q, s and fired", "non-null pointers", 0);
  }
  return Status();
}

template <typename T, typename R>
void launch_magnitude(const GateParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, RowTraits::kRows)));
  const dim3 block(RowTraits::kThreads);
  const bool aligned = reinterpret_cast<uintptr_t>(p.coefficients) % sizeof(Chunk<T>) == 0 &&
                       (p.row_stride * sizeof(T)) % sizeof(Chunk<T>) == 0;
  if (aligned) {
    COACHHOOK_LAUNCH((row_magnitude_kernel<T, R, true>), grid, block, stream, p);
  } else {
    COACHHOOK_LAUNCH((row_magnitude_kernel<T, R, false>), grid, block, stream, p);
  }
}

template <typename T>
void launch_magnitude(const GateParams& p, cudaStream_t stream) {
  if (p.reduction == Reduction::kNorm) {
    launch_magnitude<T, NormReduction>(p, stream);
  } else {
    launch_magnitude<T, MaxReduction>(p, stream);
  }
}

}  // namespace

Status row_norm_zscore_gate(const GateParams& p) {
  const Status checked = check(p);
  if (!checked.ok() || (p.rows == 0 && p.state == nullptr)) return checked;
  const DeviceGuard guard(p.device);
  if (guard.error() != cudaSuccess) return cuda_error(kGateOp, "cudaSetDevice", guard.error());
  const cudaStream_t stream = static_cast<cudaStream_t>(p.stream);

  if (p.rows > 0) {
    switch (p.dtype) {
      case DType::kFloat32:
        launch_magnitude<float>(p, stream);
        break;
      case DType::kFloat16:
        launch_magnitude<__half>(p, stream);
        break;
      case DType::kBFloat16:
        launch_magnitude<__nv_bfloat16>(p, stream);
        break;
    }
    const Status status = launched(kGateOp, "row_magnitude_kernel");
    if (!status.ok()) return status;
  }

  if (p.sequences == 0) return Status();
  const dim3 grid(static_cast<unsigned>(p.sequences));
  const dim3 block(SequenceTraits::kThreads);
  switch (p.scope) {
    case Scope::kSequence:
      COACHHOOK_LAUNCH(zscore_gate_kernel<Scope::kSequence>, grid, block, stream, p);
      break;
    case Scope::kPopulation:
      COACHHOOK_LAUNCH(zscore_gate_kernel<Scope::kPopulation>, grid, block, stream, p);
      break;
    case Scope::kDirect:
      COACHHOOK_LAUNCH(zscore_gate_kernel<Scope::kDirect>, grid, block, stream, p);
      break;
    case Scope::kPrefix:
    case Scope::kUngated:
      break;  // refused above
  }
  return launched(kGateOp, "zscore_gate_kernel");
}

Status add_correction(const CorrectionParams& p) {
  const Status checked = check(p);
  if (!checked.ok() || p.rows == 0 || p.out_features == 0) return checked;
  const DeviceGuard guard(p.device);
  if (guard.error() != cudaSuccess) {
    return cuda_error(kCorrectionOp, "cudaSetDevice", guard.error());
  }
  const cudaStream_t stream = static_cast<cudaStream_t>(p.stream);

  const int64_t row_blocks =
      p.rows < CorrectionTraits::kMaxRowBlocks ? p.rows : CorrectionTraits::kMaxRowBlocks;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.out_features, CorrectionTraits::kOutputs)),
                  static_cast<unsigned>(row_blocks));
  const dim3 block(CorrectionTraits::kThreads);
  switch (p.dtype) {
    case DType::kFloat32:
      COACHHOOK_LAUNCH(add_correction_kernel<float>, grid, block, stream, p);
      break;
    case DType::kFloat16:
      COACHHOOK_LAUNCH(add_correction_kernel<__half>, grid, block, stream, p);
      break;
    case DType::kBFloat16:
      COACHHOOK_LAUNCH(add_correction_kernel<__nv_bfloat16>, grid, block, stream, p);
      break;
  }
  return launched(kCorrectionOp, "add_correction_kernel");
}

CudaVersions cuda_versions() {
  CudaVersions versions;
  // A failing query leaves its zero: without a driver there is nothing else to report.
  if (cudaDriverGetVersion(&versions.driver) != cudaSuccess) versions.driver = 0;
  if (cudaRuntimeGetVersion(&versions.runtime) != cudaSuccess) versions.runtime = 0;
  if (cudaGetDeviceCount(&versions.devices) != cudaSuccess) versions.devices = 0;
  cudaGetLastError();  // clears what a failed count left behind
  return versions;
}

}  // namespace coachhook
