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
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kGroup = 8;       // tokens whose outputs are written together
  static constexpr int kMinOutputs = 8;  // of a warp
  static constexpr int kMaxOutputs = 32;
  // Frozen products that a lane holds while the gate is worked out.
  static constexpr int kHeld = kGroup * kMaxOutputs / kWarpSize;
  static constexpr int kFeatures = kGroup * kDecodeKeys;  // in shared memory at once
  // Blocks per multiprocessor: left alone, the compiler aims at four and spills.
  static constexpr int kBlocks = 2;
};

__device__ __forceinline__ void add_to(float& sum, float v) { sum += v; }
__device__ __forceinline__ void add_to(float4& sum, const float4& v) {
  sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
}

// Partial sums of `row`, or of the four from there on, in the order of the slices. A batch of them
// is under way at once: what takes time is the way to L2, not the bytes.
template <typename V = float, int kBatch = 8>
__device__ __forceinline__ V sum_of_splits(const Product& product, int64_t tokens, int64_t token,
                                           int64_t row) {
  const float* part = product.part + token * product.pitch + row;
  const int64_t pitch = tokens * product.pitch;
  const int splits = static_cast<int>(product.splits);
  V sum = {};
#pragma unroll 1
  for (int split = 0; split < splits; split += kBatch) {
    V batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      batch[i] = {};
      if (split + i < splits) batch[i] = *reinterpret_cast<const V*>(part + i * pitch);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) add_to(sum, batch[i]);
    part += kBatch * pitch;
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

// A number of a sequence as it lies in memory, float64 or float32: to convert it would be to wait
// for it.
struct Number {
  uint32_t word[2];

  __device__ __forceinline__ double value(bool is_double) const {
    const uint64_t bits = static_cast<uint64_t>(word[1]) << 32 | word[0];
    return is_double ? *reinterpret_cast<const double*>(&bits) : __uint_as_float(word[0]);
  }
};

__device__ __forceinline__ Number per_sequence(const void* values, bool is_double, int64_t index) {
  const uint32_t* words = static_cast<const uint32_t*>(values) + (is_double ? 2 * index : index);
  return {{words[0], is_double ? words[1] : 0u}};
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
    return {{first, last}, {first * plan.sequence_length, last * plan.sequence_length}};
  }
  if (block < gate.sequences) return {{block, block + 1}, sequence_span(gate, block)};
  const int64_t used = gate.cu_seqlens[gate.sequences];  // tokens of no sequence
  return {{0, 0}, {used < 0 ? 0 : used, gate.rows}};
}

// What a thread needs to judge its token: read ahead of the magnitude, which takes longer.
struct Judge {
  int64_t token;
  bool valid;
  float alpha;
  Number mean, std;

  // z and decision.
  __device__ __forceinline__ void decide(Scope scope, const Standard& standard,
                                         const float* magnitude, float* z, uint8_t* fired) const {
    if (scope == Scope::kUngated) {
      fired[token] = valid;
      return;
    }
    float score = magnitude[token];
    if (scope != Scope::kDirect) score = standard_score(score, without_noise(standard));
    if (!valid) score = NAN;
    z[token] = score;
    fired[token] = score >= alpha;  // false for NaN
  }
};

template <bool kStatistics>
__device__ __forceinline__ Judge make_judge(const DecodeParams& p, const DecodePlan& plan,
                                            const FinishTokens& work) {
  const GateParams& gate = p.gate;
  const int64_t token = work.tokens.begin + threadIdx.x;
  Judge judge = {token, false, gate.alpha_value, {}, {}};
  if (gate.alpha != nullptr) judge.alpha = *gate.alpha;
  if (token >= work.tokens.end) return judge;
  judge.valid = gate.mask == nullptr || gate.mask[token] != 0;
  if (kStatistics && gate.scope == Scope::kPopulation &&
      work.sequences.begin < work.sequences.end) {
    // One sequence of packed tokens; several of equal length otherwise.
    const int64_t sequence =
        gate.cu_seqlens != nullptr
            ? work.sequences.begin
            : static_cast<unsigned>(token) / static_cast<unsigned>(plan.sequence_length);
    judge.mean = per_sequence(p.mean, p.mean_is_double, sequence * p.mean_stride);
    judge.std = per_sequence(p.std, p.std_is_double, sequence * p.std_stride);
  }
  return judge;
}

// The same against the statistics of the sequence, by the whole block.
__device__ __forceinline__ void judge_sequences(const DecodeParams& p, const FinishTokens& work,
                                                const Judge& judge, const float* magnitude,
                                                float* z, uint8_t* fired) {
  const GateParams& gate = p.gate;
  for (int64_t i = work.sequences.begin; i < work.sequences.end; ++i) {
    const Span span = sequence_span(gate, i);
    const bool keeps = gate.state != nullptr && blockIdx.x == 0;
    const Standard standard = sequence_standard(
        magnitude, gate.mask, keeps ? gate.state + i * 3 : nullptr, span.begin, span.end);
    if (judge.token >= span.begin && judge.token < span.end) {
      judge.decide(gate.scope, standard, magnitude, z, fired);
    }
  }
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

// The bits of what the frozen layer gives for an output: of the element of `base`, or of our own
// sum in float32.
template <typename TY>
__device__ __forceinline__ uint32_t read_frozen(const DecodeParams& p, const DecodePlan& plan,
                                                int64_t token, int64_t out) {
  if (p.base != nullptr) {
    return bits_of(static_cast<const TY*>(p.base)[token * p.base_row_stride + out]);
  }
  float sum = sum_of_splits<float, 4>(plan.frozen, p.gate.rows, token, out);
  return __float_as_uint(p.bias != nullptr ? sum + to_float(static_cast<const TY*>(p.bias)[out])
                                           : sum);
}

// The same of every `step`-th token from `token` on, while they are fewer than `count` behind it.
template <typename TY, int kHeld>
__device__ __forceinline__ void hold_frozen(uint32_t (&held)[kHeld], const DecodeParams& p,
                                            const DecodePlan& plan, int64_t token, int step,
                                            int count, int64_t out) {
  if (p.base != nullptr) {
    const TY* base = static_cast<const TY*>(p.base) + token * p.base_row_stride + out;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      held[i] = i * step < count ? bits_of(base[i * step * p.base_row_stride]) : 0u;
    }
    return;
  }
  // Slices outermost: as many reads under way as there are outputs, in the same order of sums.
  float sum[kHeld] = {};
  const float* part = plan.frozen.part + token * plan.frozen.pitch + out;
#pragma unroll 2
  for (int split = 0; split < static_cast<int>(plan.frozen.splits); ++split) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * step < count) sum[i] += part[i * step * plan.frozen.pitch];
    }
    part += p.gate.rows * plan.frozen.pitch;
  }
  const float bias =
      p.bias != nullptr && count > 0 ? to_float(static_cast<const TY*>(p.bias)[out]) : 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) held[i] = __float_as_uint(sum[i] + bias);
}

// y = P, with `added` on it where the token takes its correction.
template <typename TY>
__device__ __forceinline__ void write_output(const DecodeParams& p, int64_t token, int64_t out,
                                             uint32_t frozen, bool takes, float added) {
  TY* y = static_cast<TY*>(p.y) + token * p.y_row_stride + out;
  if (p.base == nullptr) {
    const float sum = __uint_as_float(frozen);
    *y = from_float<TY>(takes ? sum + added : sum);
  } else if (takes) {
    *y = from_float<TY>(to_float(of_bits<TY>(frozen)) + added);
  } else if (y != static_cast<const TY*>(p.base) + token * p.base_row_stride + out) {
    *y = of_bits<TY>(frozen);
  }
}

// Totals over the warp of eight sums a lane: lane l has the one of index l / 4. The pairs that are
// added are those of warp_reduce.
__device__ __forceinline__ float reduce_eight(float (&sum)[8], int lane) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = (lane & 4 * half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, upper ? sum[i] : sum[i + half], 4 * half);
      sum[i] = (upper ? sum[i + half] : sum[i]) + other;
    }
  }
  float total = sum[0] + __shfl_xor_sync(kFullWarp, sum[0], 2);
  total += __shfl_xor_sync(kFullWarp, total, 1);
  return total;
}

// q . f for eight rows of q, by a whole warp; of the rows, `count` exist. Alignment chooses how q
// is loaded, not the order.
template <typename T>
__device__ __forceinline__ float eight_dots(const T* q, int64_t stride, int count, const float* f,
                                            int rank, int lane) {
  constexpr int kSize = Chunk<T>::kSize;
  const bool aligned = is_aligned(q) && stride % kSize == 0;
  float sum[8] = {};
#pragma unroll 1
  for (int start = lane * kSize; start < rank; start += kWarpSize * kSize) {
    if (aligned && start + kSize <= rank) {
      Chunk<T> row[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const T* address = q + (j < count ? j : 0) * stride + start;
        row[j] = *reinterpret_cast<const Chunk<T>*>(address);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float factor = f[start + i];
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[j] = fmaf(to_float(row[j].value[i]), factor, sum[j]);
      }
    } else {
      const int end = start + kSize < rank ? start + kSize : rank;
#pragma unroll 1
      for (int i = start; i < end; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          sum[j] = fmaf(to_float(q[(j < count ? j : 0) * stride + i]), f[i], sum[j]);
        }
      }
    }
  }
  return reduce_eight(sum, lane);
}

template <typename TY, typename R, bool kSummed>
__global__ void __launch_bounds__(FinishTraits::kThreads, FinishTraits::kBlocks)
    decode_finish_kernel(const DecodeParams p, const DecodePlan plan) {
  constexpr int kThreads = FinishTraits::kThreads, kWarps = FinishTraits::kWarps;
  constexpr int kGroup = FinishTraits::kGroup, kHeld = FinishTraits::kHeld;
  constexpr bool kLargest = std::is_same_v<R, MaxReduction>;
  static_assert(!(kLargest && kSummed), "the membership gate reads every coefficient");
  __shared__ float magnitude[kDecodeTokens], z[kDecodeTokens];
  __shared__ uint8_t fired[kDecodeTokens];
  __shared__ int winner[kLargest ? kDecodeTokens : 1];
  __shared__ float4 features4[kSummed ? 1 : FinishTraits::kFeatures / 4];
  float* features = reinterpret_cast<float*>(features4);
  __shared__ float sums[kLargest ? kWarps : 1][kLargest ? kDecodeKeys : 1];
  __shared__ float corrections[kWarps][kGroup][FinishTraits::kMaxOutputs];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const GateParams& gate = p.gate;
  wait_for_previous_kernel();
  const FinishTokens work = finish_tokens(gate, plan);
  const int begin = static_cast<int>(work.tokens.begin), end = static_cast<int>(work.tokens.end);
  const int rank = static_cast<int>(p.features), pitch = static_cast<int>(plan.hook.pitch);
  // Tokens whose coefficients are in shared memory at once: most blocks have no more.
  int room = static_cast<int>(kDecodeTokens);
  if (!kSummed && FinishTraits::kFeatures / pitch < room) {
    room = FinishTraits::kFeatures / pitch / kGroup * kGroup;
  }
  const bool all_fit = end - begin <= room;

  // Whatever does not wait for f is on its way first.
  const Judge judge = make_judge<!kLargest>(p, plan, work);
  const int per_warp = plan.outputs_per_warp;
  const int64_t first_out = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * per_warp;
  // The output that a lane writes, of every `step`-th token from `first_token` on of a group.
  const int column = lane % per_warp, first_token = lane / per_warp, step = kWarpSize / per_warp;
  const int64_t out = first_out + column;
  const bool writes = out < p.out_features;
  uint32_t held[kHeld];
  const auto hold = [&](int group) {
    const int rest = end - group < kGroup ? end - group : kGroup;
    const int count = writes ? rest : 0;
    hold_frozen<TY>(held, p, plan, group + first_token, step, count - first_token, out);
  };
  hold(begin);

  // Coefficients of the tokens of a round; with `firing`, of those alone that fire.
  const auto add_up = [&](int round, bool firing) {
    const int count = end - round < room ? end - round : room;
    const int chunks = pitch / 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * chunks; i += kThreads) {
      const int token = i / chunks, chunk = i % chunks;
      if (firing && !fired[round + token]) continue;
      features4[i] = sum_of_splits<float4>(plan.hook, gate.rows, round + token, 4 * chunk);
    }
  };

  for (int round = begin; round < end; round += room) {
    if constexpr (!kSummed) {
      add_up(round, false);
      __syncthreads();
    }
    for (int token = round + warp; token < end && token < round + room; token += kWarps) {
      const float* f = features + (kSummed ? 0 : (token - round) * pitch);
      Best best = {R::kIdentity, 0};
      if constexpr (kSummed) {
        for (int64_t i = lane; i < plan.square_tiles; i += kWarpSize) {
          best.value += plan.squares[token * plan.square_tiles + i];
        }
      } else if constexpr (!kLargest) {
#pragma unroll 2
        for (int i = lane; i < rank; i += kWarpSize) best.value = R::accumulate(best.value, f[i]);
      }
      if constexpr (kLargest) {
        const float* candidates = f;
        if (p.groups != nullptr) {
          sum_groups(f, p.groups, rank, sums[warp], lane);
          candidates = sums[warp];
        }
#pragma unroll 1
        for (int i = lane; i < rank; i += kWarpSize) {
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
  }

  // The membership gate knows no statistics.
  if (!kLargest && gate.scope == Scope::kPrefix) {
    const int64_t sequence = work.sequences.begin + threadIdx.x;
    if (sequence < work.sequences.end) {
      judge_prefix(p, plan, magnitude, z, fired, sequence, judge.alpha);
    }
  } else if (!kLargest && gate.scope == Scope::kSequence) {
    judge_sequences(p, work, judge, magnitude, z, fired);
  } else if (judge.token < work.tokens.end && work.sequences.begin < work.sequences.end) {
    const Scope scope = kLargest ? Scope::kDirect : gate.scope;
    const Standard standard = {0.0, judge.mean.value(p.mean_is_double),
                               judge.std.value(p.std_is_double)};
    judge.decide(scope, standard, magnitude, z, fired);
  }

  for (int round = begin; round < end; round += room) {
    __syncthreads();
    if (blockIdx.x == 0 && judge.token >= round && judge.token < round + room &&
        judge.token < end) {
      gate.z[judge.token] = z[judge.token];
    }
    if constexpr (!kSummed) {
      if (!all_fit) {
        add_up(round, true);
        __syncthreads();
      }
      if (kLargest && p.own) {
        for (int token = round + warp; token < end && token < round + room; token += kWarps) {
          if (!fired[token]) continue;
          float* f = features + (token - round) * pitch;
          const float share = magnitude[token] != 0.0f ? magnitude[token] : 1.0f;
#pragma unroll 1
          for (int i = lane; i < rank; i += kWarpSize) {
            const int64_t group = p.groups != nullptr ? p.groups[i] : i;
            f[i] = group == winner[token] ? f[i] / share : 0.0f;
          }
        }
        __syncthreads();
      }
    }
    for (int group = round; group < end && group < round + room; group += kGroup) {
      const int count = end - group < kGroup ? end - group : kGroup;
      // No lane writes before the others have read the last group's.
      __syncwarp();  // in order by shuffles, which say nothing of memory
      for (int i = 0; i < count && p.lift != nullptr; ++i) {
        if (!fired[group + i]) continue;
        const float* f =
            kSummed ? plan.features + (group + i) * pitch : features + (group + i - round) * pitch;
#pragma unroll 1
        for (int tile = 0; tile < per_warp && first_out + tile < p.out_features; tile += 8) {
          const int64_t rest = p.out_features - first_out - tile;
          const int exist = rest < 8 ? static_cast<int>(rest) : 8;
          const int64_t start = (first_out + tile) * p.lift_row_stride;
          const float dot = p.lift_dtype == DType::kFloat32
                                ? eight_dots(static_cast<const float*>(p.lift) + start,
                                             p.lift_row_stride, exist, f, rank, lane)
                                : eight_dots(static_cast<const TY*>(p.lift) + start,
                                             p.lift_row_stride, exist, f, rank, lane);
          if (lane % 4 == 0) corrections[warp][i][tile + lane / 4] = dot;
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int token = first_token + i * step;
        if (!writes || token >= count) continue;
        const bool takes = fired[group + token] != 0;
        float added = 0.0f;
        if (takes) {
          added = p.lift != nullptr ? corrections[warp][token][column]
                                    : plan.features[(group + token) * plan.hook.pitch + out];
        }
        write_output<TY>(p, group + token, out, held[i], takes, added);
      }
      if (group + kGroup < end) hold(group + kGroup);
    }
  }
}

}  // namespace coachhook
