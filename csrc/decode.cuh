// Kernels of a hook layer on at most 64 tokens.
//
//   [P; f] = [W0; S] x  in slices of the depth          decode_project_kernel
//   f, ||f||^2 per tile, for wide f                      decode_sum_kernel
//   M, z, fired; y = P + lift f where fired              decode_finish_kernel
//
// Edits that add their own, many or with cues, take the last two launches of decode_own.cuh
// instead.
//
// Slices, their order and the order in a slice depend on the sizes of the matrices, never on the
// tokens: a token has the same bits alone and in any batch. There are no atomics and no waiting
// between blocks; what the whole grid must have done lies a launch back. State is read from the
// copy the first launch made of it, since one block of the last launch overwrites it.
#pragma once

#include <type_traits>

#include "decode_project.cuh"
#include "gate.cuh"

namespace coachhook {

struct SumTraits {
  static constexpr int kThreads = 256;  // features per block
};

struct FinishTraits {
  static constexpr int kThreads = SequenceTraits::kThreads;
  static constexpr int kWarps = kThreads / kWarpSize;  // tokens per round
  // Blocks per multiprocessor: left alone, the compiler aims at four and spills.
  static constexpr int kBlocks = 2;
};

__device__ __forceinline__ float sum_of_splits(const Product& product, int64_t tokens,
                                               int64_t token, int64_t row) {
  const float* part = product.part + token * product.pitch + row;
  float sum = part[0];
#pragma unroll 8
  for (int64_t split = 1; split < product.splits; ++split) {
    sum += part[split * tokens * product.pitch];
  }
  return sum;
}

__global__ void __launch_bounds__(SumTraits::kThreads)
    decode_sum_kernel(const DecodeParams p, const DecodePlan plan) {
  __shared__ float scratch[SumTraits::kThreads / kWarpSize];
  const int64_t feature = static_cast<int64_t>(blockIdx.x) * SumTraits::kThreads + threadIdx.x;
  const int64_t token = blockIdx.y;
  wait_for_previous_kernel();
  float f = 0.0f;
  if (feature < p.features) {
    f = sum_of_splits(plan.hook, p.gate.rows, token, feature);
    plan.features[token * plan.hook.pitch + feature] = f;
  }
  const float square = block_reduce<SumTraits::kThreads>(f * f, Add(), scratch);
  if (threadIdx.x == 0) plan.squares[token * plan.square_tiles + blockIdx.x] = square;
}

// The largest by MaxReduction, the first of equal ones.
struct KeepBest {
  __device__ __forceinline__ Best operator()(Best a, Best b) const {
    const float value = MaxReduction::accumulate(a.value, b.value);
    if (a.value == b.value) return a.index < b.index ? a : b;
    return value == a.value || a.value != a.value ? a : b;
  }
};

__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    best = KeepBest()(best, {__shfl_xor_sync(kFullWarp, best.value, offset),
                             __shfl_xor_sync(kFullWarp, best.index, offset)});
  }
  return best;
}

// Coefficients summed by group, -inf where no key belongs to it; by one warp, in the order of keys.
// What the warp wrote to `f` before is waited for.
__device__ __forceinline__ void sum_groups(const float* f, const int64_t* groups, int count,
                                           float* sums, int lane) {
  for (int i = lane; i < count; i += kWarpSize) sums[i] = -INFINITY;
  __syncwarp();
  for (int start = 0; start < count; start += kWarpSize) {
    const int key = start + lane;
    const int stop = start + kWarpSize < count ? start + kWarpSize : count;
    // Groups are on the device, unchecked: one out of range is left out.
    const int64_t group = key < count ? groups[key] : -1;
    bool leads = group >= 0 && group < count;
    float sum = 0.0f;
    for (int other = start; other < stop; ++other) {
      if (groups[other] != group) continue;
      if (other < key) leads = false;
      sum += f[other];
    }
    if (leads) sums[group] = sums[group] == -INFINITY ? sum : sums[group] + sum;
    __syncwarp();
  }
}

__device__ __forceinline__ double per_sequence(const void* values, bool is_double, int64_t index) {
  return is_double ? static_cast<const double*>(values)[index]
                   : static_cast<const float*>(values)[index];
}

// Moments (count, mean, M2) of a sample and one more value: Chan, Golub, LeVeque 1983 with n = 1.
__device__ __forceinline__ void add_to_moments(double (&moments)[3], double value) {
  const double share = 1.0 / (moments[0] + 1.0);
  const double gap = value - moments[1];
  moments[2] += gap * gap * moments[0] * share;
  moments[1] += gap * share;
  moments[0] += 1.0;
}

// What a block of the last launch works on.
struct FinishTokens {
  Span sequences;
  Span tokens;
};

__device__ __forceinline__ FinishTokens finish_tokens(const GateParams& gate,
                                                      const DecodePlan& plan) {
  const int64_t block = blockIdx.y;
  if (gate.cu_seqlens == nullptr) {
    const int64_t first = block * plan.sequences_per_block;
    const int64_t last = first + plan.sequences_per_block < gate.sequences
                             ? first + plan.sequences_per_block
                             : gate.sequences;
    return {{first, last}, {sequence_span(gate, first).begin, sequence_span(gate, last - 1).end}};
  }
  if (block < gate.sequences) return {{block, block + 1}, sequence_span(gate, block)};
  const int64_t used = gate.cu_seqlens[gate.sequences];  // tokens of no sequence
  return {{0, 0}, {used < 0 ? 0 : used, gate.rows}};
}

// z and decision of the tokens of one sequence, by the whole block.
__device__ __forceinline__ void judge(const DecodeParams& p, const float* magnitude, float* z,
                                      uint8_t* fired, int64_t sequence, float alpha) {
  const GateParams& gate = p.gate;
  const Span span = sequence_span(gate, sequence);
  Standard standard = {0.0, 0.0, 1.0};
  if (gate.scope == Scope::kSequence) {
    const bool keeps = gate.state != nullptr && blockIdx.x == 0;
    standard = sequence_standard(magnitude, gate.mask, keeps ? gate.state + sequence * 3 : nullptr,
                                 span.begin, span.end);
  } else if (gate.scope == Scope::kPopulation) {
    standard.mean = per_sequence(p.mean, p.mean_is_double, sequence * p.mean_stride);
    standard.std = per_sequence(p.std, p.std_is_double, sequence * p.std_stride);
  }
  standard = without_noise(standard);
  const int64_t token = span.begin + threadIdx.x;
  if (token >= span.end) return;
  const bool valid = gate.mask == nullptr || gate.mask[token] != 0;
  if (gate.scope == Scope::kUngated) {
    fired[token] = valid;
    return;
  }
  float score = magnitude[token];
  if (gate.scope != Scope::kDirect) score = standard_score(score, standard);
  if (!valid) score = NAN;
  z[token] = score;
  fired[token] = score >= alpha;  // false for NaN
}

// The same for the prefix scope, by one thread.
__device__ __forceinline__ void judge_prefix(const DecodeParams& p, const DecodePlan& plan,
                                             const float* magnitude, float* z, uint8_t* fired,
                                             int64_t sequence, float alpha) {
  const GateParams& gate = p.gate;
  double moments[3] = {0.0, 0.0, 0.0};
  if (gate.state != nullptr) {
    for (int i = 0; i < 3; ++i) moments[i] = plan.state[sequence * 3 + i];
  }
  const Span span = sequence_span(gate, sequence);
  for (int64_t token = span.begin; token < span.end; ++token) {
    if (gate.mask != nullptr && gate.mask[token] == 0) continue;
    add_to_moments(moments, magnitude[token]);
    const Standard standard =
        without_noise({0.0, moments[1], sqrt(moments[2] / (moments[0] - 1.0))});
    const float score = standard_score(magnitude[token], standard);
    z[token] = score;
    fired[token] = score >= alpha;
  }
  if (gate.state != nullptr && blockIdx.x == 0) {
    for (int i = 0; i < 3; ++i) gate.state[sequence * 3 + i] = moments[i];
  }
}

// y = P, with `added` on it where the token takes its correction.
template <typename TY>
__device__ __forceinline__ void write_output(const DecodeParams& p, const DecodePlan& plan,
                                             int64_t token, int64_t out, bool takes, float added) {
  TY* y = static_cast<TY*>(p.y) + token * p.y_row_stride + out;
  if (p.base != nullptr) {
    const TY* base = static_cast<const TY*>(p.base) + token * p.base_row_stride + out;
    if (takes) {
      *y = from_float<TY>(to_float(*base) + added);
    } else if (y != base) {
      *y = *base;
    }
  } else {
    float frozen = sum_of_splits(plan.frozen, p.gate.rows, token, out);
    if (p.bias != nullptr) frozen += to_float(static_cast<const TY*>(p.bias)[out]);
    *y = from_float<TY>(takes ? frozen + added : frozen);
  }
}

template <typename TY, typename R, bool kSummed>
__global__ void __launch_bounds__(FinishTraits::kThreads, FinishTraits::kBlocks)
    decode_finish_kernel(const DecodeParams p, const DecodePlan plan) {
  constexpr int kWarps = FinishTraits::kWarps;
  constexpr bool kLargest = std::is_same_v<R, MaxReduction>;
  static_assert(!(kLargest && kSummed), "the membership gate reads every coefficient");
  __shared__ float magnitude[kDecodeTokens], z[kDecodeTokens];
  __shared__ uint8_t fired[kDecodeTokens];
  __shared__ int winner[kLargest ? kDecodeTokens : 1];
  __shared__ float features[kSummed ? 1 : kWarps][kSummed ? 1 : kDecodeKeys];
  __shared__ float sums[kLargest ? kWarps : 1][kLargest ? kDecodeKeys : 1];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const GateParams& gate = p.gate;
  wait_for_previous_kernel();
  const auto [sequences, tokens] = finish_tokens(gate, plan);

  for (int64_t token = tokens.begin + warp; token < tokens.end; token += kWarps) {
    Best best = {R::kIdentity, 0};
    if constexpr (kSummed) {
      for (int64_t i = lane; i < plan.square_tiles; i += kWarpSize) {
        best.value += plan.squares[token * plan.square_tiles + i];
      }
    } else {
      for (int64_t i = lane; i < p.features; i += kWarpSize) {
        const float f = sum_of_splits(plan.hook, gate.rows, token, i);
        features[warp][i] = f;
        if constexpr (!kLargest) best.value = R::accumulate(best.value, f);
      }
    }
    if constexpr (kLargest) {
      const float* candidates = features[warp];
      if (p.groups != nullptr) {
        sum_groups(features[warp], p.groups, static_cast<int>(p.features), sums[warp], lane);
        candidates = sums[warp];
      }
      for (int i = lane; i < p.features; i += kWarpSize) {
        best = i == lane ? Best{candidates[i], i} : KeepBest()(best, {candidates[i], i});
      }
      best = warp_best(best);
    } else {
      best.value = warp_reduce(best.value, Add());
    }
    if (lane == 0) {
      magnitude[token] = R::finish(best.value);
      if (kLargest) winner[token] = best.index;
      // Tokens that no sequence covers stay like this.
      z[token] = NAN;
      fired[token] = 0;
    }
  }
  __syncthreads();

  const float alpha = gate.alpha != nullptr ? *gate.alpha : gate.alpha_value;
  if (gate.scope == Scope::kPrefix) {
    const int64_t sequence = sequences.begin + threadIdx.x;
    if (sequence < sequences.end) {
      judge_prefix(p, plan, magnitude, z, fired, sequence, alpha);
    }
  } else {
    for (int64_t sequence = sequences.begin; sequence < sequences.end; ++sequence) {
      judge(p, magnitude, z, fired, sequence, alpha);
    }
  }

  const int64_t first_out =
      (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * plan.outputs_per_warp;
  const int64_t out = first_out + lane;
  const bool writes = lane < plan.outputs_per_warp && out < p.out_features;
  for (int64_t round = tokens.begin; round < tokens.end; round += kWarps) {
    __syncthreads();
    const int64_t mine = round + warp;
    if (mine < tokens.end) {
      if (blockIdx.x == 0 && lane == 0) gate.z[mine] = z[mine];
      if constexpr (!kSummed) {
        if (fired[mine]) {
          const float share = kLargest && magnitude[mine] != 0.0f ? magnitude[mine] : 1.0f;
          for (int64_t i = lane; i < p.features; i += kWarpSize) {
            float f = features[warp][i];
            if (tokens.end - tokens.begin > kWarps) {
              f = sum_of_splits(plan.hook, gate.rows, mine, i);
            }
            if (kLargest && p.own) {
              const int64_t group = p.groups != nullptr ? p.groups[i] : i;
              f = group == winner[mine] ? f / share : 0.0f;
            }
            features[warp][i] = f;
          }
        }
      }
    }
    __syncthreads();
    for (int i = 0; i < kWarps && round + i < tokens.end; ++i) {
      const int64_t token = round + i;
      const bool takes = fired[token] != 0;
      const float* f = kSummed ? plan.features + token * plan.hook.pitch : features[i];
      float added = 0.0f;
      if (takes && p.lift != nullptr) {
#pragma unroll 4
        for (int j = 0; j < plan.outputs_per_warp; ++j) {
          if (first_out + j >= p.out_features) break;
          const int64_t start = (first_out + j) * p.lift_row_stride;
          const float dot =
              p.lift_dtype == DType::kFloat32
                  ? warp_dot(static_cast<const float*>(p.lift) + start, f, p.features, lane)
                  : warp_dot(static_cast<const TY*>(p.lift) + start, f, p.features, lane);
          if (lane == j) added = dot;
        }
      }
      if (!writes) continue;
      if (takes && p.lift == nullptr) added = f[out];
      write_output<TY>(p, plan, token, out, takes, added);
    }
  }
}

}  // namespace coachhook
