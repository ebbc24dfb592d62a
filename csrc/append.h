// Keys and targets of a batch, brought to where an append of the edit memory works on them.
#pragma once

#include <cstdint>

#include "cholesky.h"

namespace coachhook {

// A matrix X [length, columns] of any strides, given by its columns.
struct Columns {
  const void* from = nullptr;
  int64_t length = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
  void* by_row = nullptr;     // [size, length] receives X^T, and zeros below it
  void* by_column = nullptr;  // [length, size] receives X, and zeros to its right; or null
};

struct BatchParams {
  Real real = Real::kFloat64;
  int64_t columns = 0;  // of both
  int64_t size = 0;     // at least as many
  Columns keys;
  Columns targets;
  int64_t row = 0;        // goes to
  int64_t* at = nullptr;  // here

  int device = 0;
  void* stream = nullptr;
};

Status load_batch(const BatchParams& params);

}  // namespace coachhook
