// Gate of a hook layer on raw device pointers: what the host sees.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace coachhook {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// How the coefficients of a token become its magnitude M.
enum class Reduction : int {
  kNorm = 0,  // ||c||_2: for Delta = Q S with orthonormal Q this is ||Delta x|| exactly
  kMax = 1,   // max_j c_j: membership, the key that matches best
};

// How M becomes z.
enum class Scope : int {
  kSequence = 0,    // (M - mean) / std over the valid tokens of the same sequence
  kPopulation = 1,  // (M - mean) / std with given mean and std
  kDirect = 2,      // z = M
  // Of decode_hooked_linear alone:
  kPrefix = 3,   // (M - mean) / std over the valid tokens of the sequence up to the token itself
  kUngated = 4,  // every valid token fires, z is NaN
};

// All pointers are device pointers; matrices are row-major with a stride in elements between rows.
struct GateParams {
  const void* coefficients = nullptr;  // [rows, rank] of `dtype`
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t rank = 0;
  int64_t row_stride = 0;

  Reduction reduction = Reduction::kNorm;
  Scope scope = Scope::kSequence;

  int64_t sequences = 0;                // B
  const int32_t* cu_seqlens = nullptr;  // [B + 1], or null: every sequence has rows / B tokens
  const uint8_t* mask = nullptr;        // [rows], 0 = padding; or null
  const double* mean = nullptr;         // population scope: [B], or [1] with stride 0
  const double* std = nullptr;
  int64_t population_stride = 0;

  const float* alpha = nullptr;  // 0-dim, read at run time: may change between graph replays
  float alpha_value = 0.0f;      // used where `alpha` is null

  double* state = nullptr;     // [B, 3] receives (count, mean, M2), or null; sequence scope only
  float* magnitude = nullptr;  // [rows] M
  float* z = nullptr;          // [rows] NaN where undefined
  uint8_t* fired = nullptr;    // [rows] z >= alpha

  int device = 0;
  void* stream = nullptr;
};

// y[t] += Q s[t] for fired tokens; the bytes of the others are not touched.
struct CorrectionParams {
  void* y = nullptr;  // [rows, out_features] of `dtype`
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t out_features = 0;
  int64_t y_row_stride = 0;

  int64_t rank = 0;
  const float* q = nullptr;  // [out_features, rank]
  int64_t q_row_stride = 0;
  const float* s = nullptr;  // [rows, rank]
  int64_t s_row_stride = 0;
  const uint8_t* fired = nullptr;  // [rows]

  int device = 0;
  void* stream = nullptr;
};

Status row_norm_zscore_gate(const GateParams& params);
Status add_correction(const CorrectionParams& params);

struct CudaVersions {
  int driver = 0;   // 0: no driver on this machine
  int runtime = 0;  // linked statically
  int devices = 0;
};

// Asks the driver; creates no CUDA context.
CudaVersions cuda_versions();

}  // namespace coachhook
