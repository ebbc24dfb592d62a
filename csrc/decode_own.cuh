// Membership with a correction of its own for each edit: any number of edits, with cues or without.
//
//   c_e, columns at which the cue of e was seen           decode_select_kernel
//   largest of the armed ones in each tile of edits
//   z, fired; y = P + column of the winner where fired     decode_take_kernel
//
// What an edit has seen of its cue belongs to one thread, and the count of columns is written a
// launch after everybody read it.
#pragma once

#include "decode.cuh"

namespace coachhook {

struct OwnTraits {
  static constexpr int kThreads = 256;  // edits, then outputs, of a block
  static constexpr int kWarps = kThreads / kWarpSize;
  // Blocks per multiprocessor: left alone, the compiler aims at six and spills.
  static constexpr int kBlocks = 4;
};

constexpr int32_t kNever = 0x7fffffff;
// Columns that an edit's register knows, and its mask; see coachhook/ops/hooked_linear/cues.py.
constexpr int32_t kRegister = 63;
constexpr uint64_t kRegisterMask = 0x7fffffffffffffff;
constexpr int32_t kMostApart = 7;  // columns between the two tokens of a cue

// The same result in every thread. `scratch` holds one element per warp and is free again on
// return.
__device__ __forceinline__ Best block_best(Best best, Best* scratch) {
  best = warp_best(best);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = best;
  __syncthreads();
  best = scratch[0];
  for (int warp = 1; warp < OwnTraits::kWarps; ++warp) best = KeepBest()(best, scratch[warp]);
  __syncthreads();
  return best;
}

__global__ void __launch_bounds__(OwnTraits::kThreads, OwnTraits::kBlocks)
    decode_select_kernel(const DecodeParams p, const DecodePlan plan) {
  __shared__ Best scratch[OwnTraits::kWarps];
  const GateParams& gate = p.gate;
  const int64_t edit = static_cast<int64_t>(blockIdx.x) * OwnTraits::kThreads + threadIdx.x;
  const bool exists = edit < p.features;
  const int64_t sequence = blockIdx.y;
  wait_for_previous_kernel();
  const Span span = sequence_span(gate, sequence);
  int64_t* seen = p.seen == nullptr ? nullptr : p.seen + sequence * (1 + 2 * p.features);
  const int32_t read = seen == nullptr ? 0 : static_cast<int32_t>(seen[0]);
  int32_t first = seen == nullptr || !exists ? kNever : static_cast<int32_t>(seen[1 + edit]);
  const float limit = p.cues == nullptr || !exists ? -INFINITY : p.limits[edit];
  const int32_t reach = p.reaches == nullptr || !exists ? kRegister : p.reaches[edit];
  int32_t gap = p.gaps == nullptr || !exists ? 0 : p.gaps[edit];
  gap = gap < 0 ? 0 : gap > kMostApart ? kMostApart : gap;
  const bool bounded = reach < kRegister - gap && limit != -INFINITY;
  if (!bounded) gap = 0;
  // A token's own column is bit 0: a cue that it shows arms no bounded edit at the token itself.
  const uint64_t window = (uint64_t{2} << (bounded && reach > 0 ? reach : 0)) - 2;
  // Masked only where it is kept: what lies beyond is further than any window and gap.
  uint64_t recent = seen == nullptr || !bounded ? 0 : seen[1 + p.features + edit];

  for (int64_t token = span.begin; token < span.end; ++token) {
    Best best = {-INFINITY, static_cast<int>(edit)};
    if (exists) {
      bool armed = true;
      if (p.cues != nullptr) {
        const int32_t column = read + static_cast<int32_t>(token - span.begin);
        const bool real = gate.mask == nullptr || gate.mask[token] != 0;
        const bool reached =
            real && (bounded || column < first) &&
            (limit == -INFINITY || sum_of_splits(plan.cues, gate.rows, token, edit) >= limit);
        recent = (recent << 1) | (reached ? 1 : 0);
        const uint64_t shown = recent & (recent >> gap);
        if ((shown & 1) != 0 && column < first) first = column;
        armed = bounded ? (shown & window) != 0 : first <= column;
      }
      if (armed) best.value = sum_of_splits(plan.hook, gate.rows, token, edit);
    }
    best = block_best(best, scratch);
    if (threadIdx.x == 0) plan.best[token * plan.best_tiles + blockIdx.x] = best;
  }
  if (seen != nullptr && exists) {
    seen[1 + edit] = first;
    if (bounded) seen[1 + p.features + edit] = static_cast<int64_t>(recent & kRegisterMask);
  }
}

template <typename TY>
__global__ void __launch_bounds__(OwnTraits::kThreads, OwnTraits::kBlocks)
    decode_take_kernel(const DecodeParams p, const DecodePlan plan) {
  __shared__ Best scratch[OwnTraits::kWarps];
  const GateParams& gate = p.gate;
  const int64_t token = blockIdx.y;
  wait_for_previous_kernel();
  // On its way while the winner is found.
  const int64_t out = static_cast<int64_t>(blockIdx.x) * OwnTraits::kThreads + threadIdx.x;
  uint32_t frozen = 0u;
  if (out < p.out_features) frozen = read_frozen<TY>(p, plan, token, out);
  const bool covered = gate.cu_seqlens == nullptr || token < gate.cu_seqlens[gate.sequences];
  const bool valid = covered && (gate.mask == nullptr || gate.mask[token] != 0);
  Best best = {-INFINITY, 0x7fffffff};
  if (covered) {
    for (int64_t i = threadIdx.x; i < plan.best_tiles; i += OwnTraits::kThreads) {
      const Best other = plan.best[token * plan.best_tiles + i];
      best = i == threadIdx.x ? other : KeepBest()(best, other);
    }
  }
  best = block_best(best, scratch);
  const float alpha = gate.alpha != nullptr ? *gate.alpha : gate.alpha_value;
  const float z = valid ? best.value : NAN;
  // An edit that is not armed never fires. Offsets are on the device, unchecked: a token that they
  // leave out has no winner.
  const bool takes = z >= alpha && !(p.cues != nullptr && z == -INFINITY) && best.index >= 0 &&
                     best.index < p.features;
  if (blockIdx.x == 0 && threadIdx.x == 0) gate.z[token] = z;

  if (out < p.out_features) {
    float added = 0.0f;
    if (takes) {
      const int64_t at = out * p.lift_row_stride + best.index;
      added = p.lift_dtype == DType::kFloat32 ? static_cast<const float*>(p.lift)[at]
                                              : to_float(static_cast<const TY*>(p.lift)[at]);
      added *= best.value == 0.0f ? 0.0f : best.value / best.value;
    }
    write_output<TY>(p, token, out, frozen, takes, added);
  }
  if (p.seen != nullptr && blockIdx.x == 0 && token == 0) {
    for (int64_t i = threadIdx.x; i < gate.sequences; i += OwnTraits::kThreads) {
      const Span span = sequence_span(gate, i);
      if (span.end > span.begin) {
        p.seen[i * (1 + 2 * p.features)] += span.end - span.begin;
      }
    }
  }
}

}  // namespace coachhook
