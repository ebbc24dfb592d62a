// Rank-k update of a Cholesky factor on raw device pointers: what the host sees.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace coachhook {

enum class Real : int { kFloat32 = 0, kFloat64 = 1 };

constexpr int kPanelWidth = 32;    // columns of a panel
constexpr int kInverseWidth = 64;  // rows of a diagonal block inverted by a kernel
constexpr int kArrivals = 4;       // counters for 64 rows of a solve

// With X = L^-1 K the new factor is L G, G = chol(I + s X X^T). Per panel of 32 columns, from
// P = sum of X_i^T X_i over the panels before it and R R^T = I + s P:
//   Y = R^-1 X_j^T,  G_jj = chol(I + s Y^T Y),  W_j = s R^-T Y G_jj^-T;
// the same of panel 1 with more than 32 keys without R, see panel_rotations_kernel.
// Arrays are contiguous and row-major. `columns` is the number k of keys rounded up to 32 or 64;
// columns from k on are zero.
struct RotationParams {
  Real real = Real::kFloat64;
  int64_t n = 0;
  int64_t keys = 0;              // k
  int64_t columns = 0;           // 32 or 64
  int sign = 1;                  // s
  const void* solved = nullptr;  // [32 panels, columns] X, zero below row n
  // [panels + 1, columns, columns] X_j^T X_j; becomes P, then all. With 64 columns and more than
  // one panel there is another entry, Z Z^T of the first 64 rows Z of X.
  void* sums = nullptr;
  const void* factor = nullptr;  // L, of which the diagonal is checked
  int64_t diagonal_stride = 0;   // elements from one diagonal entry to the next
  double margin = 0.0;           // (1 - margin) I + s X^T X must be positive definite
  double pivot_limit = 0.0;      // largest ratio of its squared pivots called even
  void* rotations = nullptr;     // [panels, 32 + columns, 32] receives G_jj over W_j
  void* inverse = nullptr;       // [columns, columns] receives its inverse, or null
  int32_t* status = nullptr;     // [2], zero on entry: failed, pivots not even

  int device = 0;
  void* stream = nullptr;
};

// L <- L G below and on the diagonal, where status[0] is 0; else nothing is written:
//   L_ij <- L_ij G_jj + (K_i - sum_{p <= j} L_ip X_p) W_j  for i > j,   L_jj <- L_jj G_jj.
struct ApplyParams {
  Real real = Real::kFloat64;
  int64_t n = 0;
  int64_t columns = 0;
  void* factor = nullptr;  // [n, n], any strides
  int64_t row_stride = 0;
  int64_t column_stride = 0;
  const void* residuals = nullptr;  // [chunks, n, columns]: K_i minus the sum left of the chunk
  int64_t chunk = 0;                // columns of L in a chunk, a multiple of 32
  const void* solved = nullptr;
  const void* rotations = nullptr;
  const int32_t* status = nullptr;

  int device = 0;
  void* stream = nullptr;
};

// Inverses of the diagonal blocks of L of `rows` rows, zero above their diagonals. What lies below
// and to the right of row n in the last of them is for nobody to read.
struct InverseParams {
  Real real = Real::kFloat64;
  int64_t n = 0;
  int64_t rows = 0;              // a power of two from 64 on
  const void* factor = nullptr;  // L [n, n], any strides
  int64_t row_stride = 0;
  int64_t column_stride = 0;
  void* inverses = nullptr;  // [blocks, rows, rows], rows (rows + 1) elements from block to block
  void* scratch = nullptr;   // [blocks, rows / 2, rows / 2]
  uint32_t* arrivals = nullptr;  // of SolveParams, set to zero

  int device = 0;
  void* stream = nullptr;
};

// X = L^-1 K or L^-T K by blocks of `rows` rows, with the inverses of the diagonal blocks in whole.
// All arrays of `columns` columns are contiguous and row-major.
struct SolveParams {
  Real real = Real::kFloat64;
  int64_t n = 0;
  int64_t rows = 0;
  int64_t columns = 0;  // 32 or 64
  bool transposed = false;
  bool keep = false;  // the residuals of every step, not only of the last; not transposed
  const void* factor = nullptr;  // L [n, n], any strides
  int64_t row_stride = 0;
  int64_t column_stride = 0;
  const void* inverses = nullptr;  // as in InverseParams
  const void* right = nullptr;     // K [n, columns]
  // [n, columns], scratch that may be K itself. With `keep` [blocks, n, columns], the first K:
  // entry j receives in the rows from the beginning of block j on what X of the blocks before
  // leaves of K.
  void* residuals = nullptr;
  void* solved = nullptr;        // [n, columns] receives X
  int64_t workers = 0;           // blocks of threads at most: those that run at once
  void* partial = nullptr;       // [2 workers, 64, columns], scratch
  uint32_t* arrivals = nullptr;  // [n / 64 rounded up, kArrivals], zero before and after

  int device = 0;
  void* stream = nullptr;
};

Status cholesky_invert(const InverseParams& params);
Status cholesky_solve(const SolveParams& params);
Status cholesky_rotations(const RotationParams& params);
Status cholesky_apply(const ApplyParams& params);

}  // namespace coachhook
