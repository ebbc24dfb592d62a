// A hook layer on few tokens: product with the stacked rows, gate and correction in two or three
// launches.
#pragma once

#include <cstdint>

#include "gate.h"

namespace coachhook {

// Most tokens a call takes: beyond, the products are no longer bound by the bytes of the weights.
constexpr int64_t kDecodeTokens = 64;
// Most keys of the membership gate where coefficients are summed, over a group or all of them:
// those of a token lie in shared memory. Edits that are each one key and add their own are not
// bounded.
constexpr int64_t kDecodeKeys = 512;

// y = P + (lift f where the gate fires), f = projection x, P = weight x + bias or `base`.
//
// Matrices are row-major with a stride in elements between rows. Of `gate` are used: rows (tokens),
// reduction, scope (all), sequences, cu_seqlens, mask, alpha, state (read by kPrefix, written by
// kPrefix and kSequence) and z; device and stream.
struct DecodeParams {
  const void* x = nullptr;  // [rows, depth] of `dtype`
  DType dtype = DType::kFloat32;
  int64_t depth = 0;
  int64_t x_row_stride = 0;

  int64_t out_features = 0;      // 0: scores alone
  const void* weight = nullptr;  // [out_features, depth] of `dtype`, or null: `base` is given
  int64_t weight_row_stride = 0;
  const void* bias = nullptr;  // [out_features] of `dtype`, or null
  const void* base = nullptr;  // [rows, out_features] of `y_dtype`; may be y itself
  int64_t base_row_stride = 0;

  const void* projection = nullptr;  // [features, depth] of `projection_dtype`
  DType projection_dtype = DType::kFloat32;
  int64_t features = 0;
  int64_t projection_row_stride = 0;
  // [out_features, features] of `lift_dtype`, or null: f itself is added
  const void* lift = nullptr;
  DType lift_dtype = DType::kFloat32;
  int64_t lift_row_stride = 0;

  const int64_t* groups = nullptr;  // [features] group of each key, with reduction=max; or null
  bool own = false;                 // membership: add the winning group's share alone

  // With `own` and without groups: [features, depth] of `projection_dtype`, the cues that edits
  // wait for, or null; see coachhook/ops/hooked_linear/cues.py.
  const void* cues = nullptr;
  int64_t cues_row_stride = 0;
  const float* limits = nullptr;     // [features], with cues
  const int32_t* reaches = nullptr;  // [features], with cues; or null
  const int32_t* gaps = nullptr;     // [features], with reaches; or null
  // [sequences, 1 + 2 features] columns read, that at which each cue was first seen, and in which
  // of the last ones its limit was reached; or null
  int64_t* seen = nullptr;

  const void* mean = nullptr;  // population scope: float64 or float32
  const void* std = nullptr;
  bool mean_is_double = true;
  bool std_is_double = true;
  int64_t mean_stride = 0;  // between sequences; 0: one for all
  int64_t std_stride = 0;

  GateParams gate;

  void* y = nullptr;  // [rows, out_features] of `y_dtype`
  DType y_dtype = DType::kFloat32;
  int64_t y_row_stride = 0;

  bool overlap = false;  // launch kernels before those in front have ended; needs sm_90 or newer

  void* workspace = nullptr;  // decode_workspace(params) bytes, on 16 bytes; contents irrelevant
};

// Bytes of workspace for the sizes in `params`; its pointers are not looked at beyond null or not.
int64_t decode_workspace(const DecodeParams& params);

Status decode_hooked_linear(const DecodeParams& params);

}  // namespace coachhook
