// Features S x of bfloat16 tokens, S in float32: each number of S is cut into a high and a low
// bfloat16 number (relative error 2^-16), both products are summed in float32.
#pragma once

#include <cstdint>

namespace coachhook {

// The cut S is half a megabyte then, what the second-level cache holds beside x.
constexpr int64_t kMaxRank = 192;

struct PairProductParams {
  const uint16_t* x;  // [tokens, n], bfloat16
  int64_t x_row_stride;
  int64_t tokens;
  int64_t n;
  const float* s;  // [rank, n]
  int64_t s_row_stride;
  int64_t rank;     // 1 to kMaxRank
  float* features;  // [rank, tokens]
  double* norms;    // [tokens], of the tokens' features
};

// Whether this processor has the instructions. pair_product() must not be called otherwise.
bool has_pair_product();

// The bits of a token do not depend on the others. Throws std::bad_alloc.
void pair_product(const PairProductParams& p);

}  // namespace coachhook
