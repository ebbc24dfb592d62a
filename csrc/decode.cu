// Host side of decoding: checks, how the products are cut, workspace, launches.
#include "decode_own.cuh"

#include <cstdint>

namespace coachhook {
namespace {

constexpr const char* kOp = "decode_hooked_linear";

// Blocks of a matrix of many rows: several for each of 108 to 148 multiprocessors, so that the last
// ones end together. A short matrix takes one for each, since every block of the last launch reads
// all its partial sums.
constexpr int64_t kBlocksWanted = 512;
constexpr int64_t kBlocksWantedShort = 128;
// Shorter slices cost more in partial sums than they hide.
constexpr int64_t kMinSlice = 1024;
constexpr int64_t kMinSliceShort = 512;
// Matrices with fewer rows cannot fill the device: more warps of a block share them.
constexpr int64_t kShortMatrix = 1024;
// From here on reading partial sums in every block costs more than a launch that adds them up.
constexpr int64_t kRepeatedBytes = int64_t{16} << 20;
// Fewer blocks of the last launch than this leave multiprocessors idle.
constexpr int64_t kFinishBlocks = 96;
// Offsets in a slice are 32-bit.
constexpr int64_t kMaxDepth = int64_t{1} << 30;
constexpr int64_t kMaxGridY = 65535;

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether every row starts, and ends, on 16 bytes.
bool reads_are_aligned(const DecodeParams& p) {
  const auto aligned = [&p](const void* data, int64_t row_stride, DType dtype) {
    return is_aligned(data) && row_stride * size_of(dtype) % 16 == 0 &&
           p.depth * size_of(dtype) % 16 == 0;
  };
  return aligned(p.x, p.x_row_stride, p.dtype) &&
         (p.weight == nullptr || aligned(p.weight, p.weight_row_stride, p.dtype)) &&
         (p.cues == nullptr || aligned(p.cues, p.cues_row_stride, p.projection_dtype)) &&
         aligned(p.projection, p.projection_row_stride, p.projection_dtype);
}

// How many tokens a block of the first launch takes; the rest follows along the grid's second axis.
enum class Width { kNarrow, kWide };

// Rows that are not aligned are read element by element in any case: one kernel is enough.
Width width(const DecodeParams& p) {
  const bool wide = p.gate.rows > ProjectTraits<1>::kTokens && reads_are_aligned(p);
  return wide ? Width::kWide : Width::kNarrow;
}

// The slices depend on the matrix alone: neither on the number of tokens nor on the device.
Product cut(const DecodeParams& p, const void* matrix, int64_t rows, int64_t row_stride,
            DType dtype) {
  using Traits = ProjectTraits<1>;
  static_assert(Traits::kWarps == ProjectTraits<8>::kWarps &&
                    Traits::kWarps % StepTraits::kDepthWarps == 0 &&
                    Traits::kWarps % StepTraits::kDepthWarpsShort == 0,
                "one cut for all");
  const bool is_short = rows <= kShortMatrix;
  Product product;
  product.matrix = matrix;
  product.rows = rows;
  product.row_stride = row_stride;
  product.depth_warps = is_short ? StepTraits::kDepthWarpsShort : StepTraits::kDepthWarps;
  product.tiles = ceil_div(rows, Traits::kWarps / product.depth_warps * Traits::kWarpRows);
  const int64_t step =
      dtype == DType::kFloat32 ? StepTraits::kDepth<float> : StepTraits::kDepth<__half>;
  const int64_t wanted = is_short ? kBlocksWantedShort : kBlocksWanted;
  const int64_t slice = ceil_div(p.depth, ceil_div(wanted, product.tiles));
  const int64_t least = is_short ? kMinSliceShort : kMinSlice;
  product.slice = round_up(slice < least ? least : slice, step * product.depth_warps);
  product.splits = ceil_div(p.depth, product.slice);
  product.pitch = round_up(rows, 4);
  return product;
}

// Gives out pieces of the workspace, each on 16 bytes.
struct Pieces {
  char* next;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* piece = next == nullptr ? nullptr : reinterpret_cast<T*>(next + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 16);
    return piece;
  }
};

// Whether every token takes one edit's column: then no coefficient is summed with another.
bool selects(const DecodeParams& p) {
  return p.gate.reduction == Reduction::kMax && p.own && p.groups == nullptr &&
         (p.cues != nullptr || p.features > kDecodeKeys);
}

int64_t finish_columns(const DecodeParams& p, const DecodePlan& plan) {
  const int64_t outputs = FinishTraits::kWarps * plan.outputs_per_warp;
  return p.out_features > 0 ? ceil_div(p.out_features, outputs) : 1;
}

int64_t finish_rows(const DecodeParams& p, const DecodePlan& plan) {
  return p.gate.cu_seqlens != nullptr ? p.gate.sequences + 1
                                      : ceil_div(p.gate.sequences, plan.sequences_per_block);
}

// Blocks of the last launch: each adds up the slices of its tokens, so there are few of them, but
// enough to fill the device.
void divide_finish(const DecodeParams& p, DecodePlan* plan) {
  if (p.gate.cu_seqlens == nullptr) {
    const int64_t length = p.gate.rows / p.gate.sequences;
    const int64_t tokens =
        p.gate.rows > FinishTraits::kGroup ? FinishTraits::kGroup : FinishTraits::kGroup / 2;
    plan->sequence_length = length;
    plan->sequences_per_block = length < tokens ? tokens / length : 1;
  }
  plan->outputs_per_warp = FinishTraits::kMaxOutputs;
  while (plan->outputs_per_warp > FinishTraits::kMinOutputs &&
         finish_columns(p, *plan) * finish_rows(p, *plan) < kFinishBlocks) {
    plan->outputs_per_warp /= 2;
  }
}

DecodePlan make_plan(const DecodeParams& p, int64_t* bytes) {
  DecodePlan plan;
  Pieces pieces{static_cast<char*>(p.workspace)};
  const int64_t tokens = p.gate.rows;
  if (p.weight != nullptr) {
    plan.frozen = cut(p, p.weight, p.out_features, p.weight_row_stride, p.dtype);
    plan.frozen.part = pieces.take<float>(plan.frozen.splits * tokens * plan.frozen.pitch);
  }
  plan.hook = cut(p, p.projection, p.features, p.projection_row_stride, p.projection_dtype);
  plan.hook.part = pieces.take<float>(plan.hook.splits * tokens * plan.hook.pitch);
  if (p.cues != nullptr) {
    plan.cues = cut(p, p.cues, p.features, p.cues_row_stride, p.projection_dtype);
    plan.cues.part = pieces.take<float>(plan.cues.splits * tokens * plan.cues.pitch);
  }
  plan.selects = selects(p);
  if (plan.selects) {
    plan.best_tiles = ceil_div(p.features, OwnTraits::kThreads);
    plan.best = pieces.take<Best>(tokens * plan.best_tiles);
  }
  if (p.gate.state != nullptr) plan.state = pieces.take<double>(p.gate.sequences * 3);
  divide_finish(p, &plan);
  plan.summed = p.features > kDecodeKeys || p.lift == nullptr;
  const int64_t repeated = finish_columns(p, plan) * plan.hook.splits * tokens * p.features * 4;
  plan.sums_first = !plan.selects && (plan.summed || repeated > kRepeatedBytes);
  if (plan.sums_first) {
    plan.square_tiles = ceil_div(p.features, SumTraits::kThreads);
    plan.features = pieces.take<float>(tokens * plan.hook.pitch);
    plan.squares = pieces.take<float>(tokens * plan.square_tiles);
  }
  if (bytes != nullptr) *bytes = pieces.used;
  return plan;
}

Status check(const DecodeParams& p) {
  const GateParams& gate = p.gate;
  COACHHOOK_REQUIRE(gate.rows >= 1 && gate.rows <= kDecodeTokens, kOp, "rows", "in 1..64",
                    gate.rows);
  COACHHOOK_REQUIRE(p.depth >= 1 && p.depth <= kMaxDepth, kOp, "depth", "in 1..2^30", p.depth);
  COACHHOOK_REQUIRE(p.features >= 1, kOp, "features", ">= 1", p.features);
  COACHHOOK_REQUIRE(p.out_features >= 0, kOp, "out_features", ">= 0", p.out_features);
  COACHHOOK_REQUIRE(p.lift != nullptr || p.out_features == 0 || p.out_features == p.features, kOp,
                    "features", "out_features without lift", p.features);
  COACHHOOK_REQUIRE(p.x && p.projection && gate.z && p.workspace, kOp,
                    "x, projection, z and workspace", "non-null pointers", 0);
  COACHHOOK_REQUIRE(is_aligned(p.workspace), kOp, "workspace", "on 16 bytes", 1);
  COACHHOOK_REQUIRE(p.projection_dtype == p.dtype || p.projection_dtype == DType::kFloat32, kOp,
                    "projection_dtype", "that of x or float32",
                    static_cast<int>(p.projection_dtype));
  if (p.out_features > 0) {
    COACHHOOK_REQUIRE(p.y != nullptr, kOp, "y", "a non-null pointer", 0);
    COACHHOOK_REQUIRE((p.weight != nullptr) != (p.base != nullptr), kOp, "weight or base",
                      "given, not both", p.weight != nullptr);
    COACHHOOK_REQUIRE(p.weight == nullptr || p.y_dtype == p.dtype, kOp, "y_dtype",
                      "that of x with weight", static_cast<int>(p.y_dtype));
    COACHHOOK_REQUIRE(
        p.lift == nullptr || p.lift_dtype == p.y_dtype || p.lift_dtype == DType::kFloat32, kOp,
        "lift_dtype", "that of y or float32", static_cast<int>(p.lift_dtype));
  }
  const bool largest = gate.reduction == Reduction::kMax;
  COACHHOOK_REQUIRE(!largest || p.features <= kDecodeKeys || selects(p), kOp, "features",
                    "<= 512 with reduction=max, unless with own and without groups", p.features);
  COACHHOOK_REQUIRE(p.cues == nullptr || selects(p), kOp, "cues",
                    "null unless with own and without groups", 1);
  COACHHOOK_REQUIRE((p.cues == nullptr) == (p.limits == nullptr), kOp, "limits",
                    "given with cues, and not without", p.limits != nullptr);
  COACHHOOK_REQUIRE(p.reaches == nullptr || p.cues != nullptr, kOp, "reaches", "null without cues",
                    1);
  COACHHOOK_REQUIRE(p.gaps == nullptr || p.reaches != nullptr, kOp, "gaps", "null without reaches",
                    1);
  COACHHOOK_REQUIRE(p.seen == nullptr || p.cues != nullptr, kOp, "seen", "null without cues", 1);
  COACHHOOK_REQUIRE(!largest || p.lift != nullptr, kOp, "lift", "non-null with reduction=max", 0);
  COACHHOOK_REQUIRE(largest == (gate.scope == Scope::kDirect), kOp, "scope",
                    "direct with reduction=max, and not without", static_cast<int>(gate.scope));
  COACHHOOK_REQUIRE(largest || (p.groups == nullptr && !p.own), kOp, "groups and own",
                    "unset unless reduction=max", 1);
  COACHHOOK_REQUIRE(gate.sequences >= 1 && gate.sequences < kMaxGridY, kOp, "sequences",
                    "in 1..65534", gate.sequences);
  COACHHOOK_REQUIRE(gate.cu_seqlens != nullptr || gate.rows % gate.sequences == 0, kOp, "rows",
                    "a multiple of sequences without cu_seqlens", gate.rows);
  COACHHOOK_REQUIRE(gate.scope != Scope::kPopulation || (p.mean && p.std), kOp, "mean and std",
                    "non-null pointers with scope=population", 0);
  COACHHOOK_REQUIRE(
      gate.state == nullptr || gate.scope == Scope::kSequence || gate.scope == Scope::kPrefix, kOp,
      "state", "null unless scope is sequence or prefix", 1);
  return Status();
}

template <typename TX, typename TS, int kTiles, bool kAligned>
void launch_project(const DecodeParams& p, const DecodePlan& plan, cudaStream_t stream) {
  using Traits = ProjectTraits<kTiles>;
  const int64_t blocks = plan.frozen.blocks() + plan.hook.blocks() + plan.cues.blocks();
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(ceil_div(p.gate.rows, Traits::kTokens)));
  COACHHOOK_LAUNCH((decode_project_kernel<TX, TS, kTiles, kAligned>), grid, dim3(Traits::kThreads),
                   stream, p, plan);
}

template <typename TX, typename TS>
void launch_project(const DecodeParams& p, const DecodePlan& plan, cudaStream_t stream) {
  if (width(p) == Width::kWide) {
    launch_project<TX, TS, 8, true>(p, plan, stream);
  } else if (reads_are_aligned(p)) {
    launch_project<TX, TS, 1, true>(p, plan, stream);
  } else {
    launch_project<TX, TS, 1, false>(p, plan, stream);
  }
}

template <typename TX>
void launch_project(const DecodeParams& p, const DecodePlan& plan, cudaStream_t stream) {
  if (p.projection_dtype == p.dtype) {
    launch_project<TX, TX>(p, plan, stream);
  } else {
    launch_project<TX, float>(p, plan, stream);
  }
}

template <typename TY>
void launch_take(const DecodeParams& p, const DecodePlan& plan, cudaStream_t stream) {
  const int64_t columns = p.out_features > 0 ? ceil_div(p.out_features, OwnTraits::kThreads) : 1;
  const dim3 grid(static_cast<unsigned>(columns), static_cast<unsigned>(p.gate.rows));
  COACHHOOK_LAUNCH_OVERLAPPED((decode_take_kernel<TY>), grid, dim3(OwnTraits::kThreads), stream,
                              p.overlap, p, plan);
}

template <typename TY>
void launch_finish(const DecodeParams& p, const DecodePlan& plan, cudaStream_t stream) {
  if (plan.selects) return launch_take<TY>(p, plan, stream);
  const dim3 grid(static_cast<unsigned>(finish_columns(p, plan)),
                  static_cast<unsigned>(finish_rows(p, plan)));
  const dim3 block(FinishTraits::kThreads);
  if (p.gate.reduction == Reduction::kMax) {
    COACHHOOK_LAUNCH_OVERLAPPED((decode_finish_kernel<TY, MaxReduction, false>), grid, block,
                                stream, p.overlap, p, plan);
  } else if (plan.summed) {
    COACHHOOK_LAUNCH_OVERLAPPED((decode_finish_kernel<TY, NormReduction, true>), grid, block,
                                stream, p.overlap, p, plan);
  } else {
    COACHHOOK_LAUNCH_OVERLAPPED((decode_finish_kernel<TY, NormReduction, false>), grid, block,
                                stream, p.overlap, p, plan);
  }
}

}  // namespace

int64_t decode_workspace(const DecodeParams& p) {
  int64_t bytes = 0;
  make_plan(p, &bytes);
  return bytes;
}

Status decode_hooked_linear(const DecodeParams& p) {
  const Status checked = check(p);
  if (!checked.ok()) return checked;
  const DeviceGuard guard(p.gate.device);
  if (guard.error() != cudaSuccess) return cuda_error(kOp, "cudaSetDevice", guard.error());
  const cudaStream_t stream = static_cast<cudaStream_t>(p.gate.stream);
  DecodePlan plan = make_plan(p, nullptr);

  switch (p.dtype) {
    case DType::kFloat32:
      launch_project<float, float>(p, plan, stream);
      break;
    case DType::kFloat16:
      launch_project<__half>(p, plan, stream);
      break;
    case DType::kBFloat16:
      launch_project<__nv_bfloat16>(p, plan, stream);
      break;
  }
  Status status = launched(kOp, "decode_project_kernel");
  if (!status.ok()) return status;

  if (plan.sums_first) {
    const dim3 grid(static_cast<unsigned>(plan.square_tiles), static_cast<unsigned>(p.gate.rows));
    COACHHOOK_LAUNCH_OVERLAPPED(decode_sum_kernel, grid, dim3(SumTraits::kThreads), stream,
                                p.overlap, p, plan);
    status = launched(kOp, "decode_sum_kernel");
    if (!status.ok()) return status;
    // The same sums in the same order as the last launch would form: the same bits.
    plan.hook.part = plan.features;
    plan.hook.splits = 1;
  }

  if (plan.selects) {
    const dim3 grid(static_cast<unsigned>(plan.best_tiles),
                    static_cast<unsigned>(p.gate.sequences));
    COACHHOOK_LAUNCH_OVERLAPPED(decode_select_kernel, grid, dim3(OwnTraits::kThreads), stream,
                                p.overlap, p, plan);
    status = launched(kOp, "decode_select_kernel");
    if (!status.ok()) return status;
  }

  switch (p.y_dtype) {
    case DType::kFloat32:
      launch_finish<float>(p, plan, stream);
      break;
    case DType::kFloat16:
      launch_finish<__half>(p, plan, stream);
      break;
    case DType::kBFloat16:
      launch_finish<__nv_bfloat16>(p, plan, stream);
      break;
  }
  return launched(kOp, plan.selects ? "decode_take_kernel" : "decode_finish_kernel");
}

}  // namespace coachhook
