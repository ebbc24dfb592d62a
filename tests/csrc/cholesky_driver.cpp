// Runs csrc/cholesky.cu and csrc/append.cu on the host, see driver.h.
#include "driver.h"

#include "append.cu"
#include "cholesky.cu"

namespace {

void run_rotations() {
  coachhook::RotationParams p;
  p.real = static_cast<coachhook::Real>(read_int());
  p.n = read_int();
  p.keys = read_int();
  p.columns = read_int();
  p.sign = static_cast<int>(read_int());
  p.diagonal_stride = read_int();
  const bool with_inverse = read_int() != 0;
  const Bytes numbers = read_array(), solved = read_array(), factor = read_array();
  const int64_t sums_size = read_int();
  const Bytes sums(new char[sums_size]);
  read(sums.get(), sums_size);
  std::memcpy(&p.margin, numbers.get(), sizeof(double));
  std::memcpy(&p.pivot_limit, numbers.get() + sizeof(double), sizeof(double));
  const int64_t element = p.real == coachhook::Real::kFloat64 ? 8 : 4;
  const int64_t panels = (p.n + coachhook::kPanelWidth - 1) / coachhook::kPanelWidth;
  const int64_t rotations_size =
      panels * (coachhook::kPanelWidth + p.columns) * coachhook::kPanelWidth * element;
  const int64_t inverse_size = with_inverse ? p.columns * p.columns * element : 0;
  const Bytes rotations = unwritten(rotations_size), inverse = unwritten(inverse_size);
  int32_t* status = new int32_t[2]();
  p.solved = solved.get();
  p.sums = sums.get();
  p.factor = factor.get();
  p.rotations = rotations.get();
  if (with_inverse) p.inverse = inverse.get();
  p.status = status;
  finish(coachhook::cholesky_rotations(p));
  write(status, 2 * sizeof(int32_t));
  write(sums.get(), sums_size);
  write(rotations.get(), rotations_size);
  write(inverse.get(), inverse_size);
  delete[] status;
}

void run_apply() {
  coachhook::ApplyParams p;
  p.real = static_cast<coachhook::Real>(read_int());
  p.n = read_int();
  p.columns = read_int();
  p.row_stride = read_int();
  p.column_stride = read_int();
  p.chunk = read_int();
  // Elements in front of the matrix move it off a 16-byte boundary.
  const int64_t offset = read_int();
  const int64_t factor_size = read_int();
  const Bytes factor(new char[factor_size]);
  read(factor.get(), factor_size);
  const Bytes residuals = read_array(), solved = read_array(), rotations = read_array();
  const Bytes status = read_array();
  p.factor = factor.get() + offset * (p.real == coachhook::Real::kFloat64 ? 8 : 4);
  p.residuals = residuals.get();
  p.solved = solved.get();
  p.rotations = rotations.get();
  p.status = reinterpret_cast<const int32_t*>(status.get());
  finish(coachhook::cholesky_apply(p));
  write(factor.get(), factor_size);
}

int64_t arrivals_of(int64_t n) {
  return coachhook::ceil_div(n, coachhook::kTileRows) * coachhook::kArrivals;
}

void check_zero(const char* bytes, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    if (bytes[i] == 0) continue;
    std::fprintf(stderr, "cholesky_driver: arrivals are not zero afterwards\n");
    std::exit(4);
  }
}

void run_invert() {
  coachhook::InverseParams p;
  p.real = static_cast<coachhook::Real>(read_int());
  p.n = read_int();
  p.rows = read_int();
  p.row_stride = read_int();
  p.column_stride = read_int();
  const int64_t offset = read_int(), inverses_size = read_int();
  const Bytes factor = read_array(), inverses = unwritten(inverses_size);
  const int64_t arrivals_size = arrivals_of(p.n) * sizeof(uint32_t);
  const Bytes arrivals = unwritten(arrivals_size);
  p.factor = factor.get() + offset * (p.real == coachhook::Real::kFloat64 ? 8 : 4);
  p.inverses = inverses.get();
  const int64_t blocks = coachhook::ceil_div(p.n, p.rows);
  const int64_t element = p.real == coachhook::Real::kFloat64 ? 8 : 4;
  const Bytes scratch = unwritten(blocks * p.rows * p.rows / 4 * element);
  p.scratch = scratch.get();
  p.arrivals = reinterpret_cast<uint32_t*>(arrivals.get());
  finish(coachhook::cholesky_invert(p));
  check_zero(arrivals.get(), arrivals_size);
  write(inverses.get(), inverses_size);
}

void run_solve() {
  coachhook::SolveParams p;
  p.real = static_cast<coachhook::Real>(read_int());
  p.n = read_int();
  p.rows = read_int();
  p.columns = read_int();
  p.transposed = read_int() != 0;
  p.keep = read_int() != 0;
  p.row_stride = read_int();
  p.column_stride = read_int();
  const int64_t offset = read_int();
  p.workers = read_int();
  const Bytes factor = read_array(), inverses = read_array();
  const int64_t residuals_size = read_int();
  const Bytes residuals(new char[residuals_size]);
  read(residuals.get(), residuals_size);
  // The right side is an array of its own, unless its residuals are kept.
  const Bytes apart = unwritten(residuals_size);
  const int64_t element = p.real == coachhook::Real::kFloat64 ? 8 : 4;
  const int64_t solved_size = p.n * p.columns * element;
  const Bytes solved = unwritten(solved_size);
  const Bytes partial = unwritten(2 * p.workers * coachhook::kTileRows * p.columns * element);
  const int64_t arrivals_size = arrivals_of(p.n) * sizeof(uint32_t);
  const Bytes arrivals(new char[arrivals_size]());
  p.partial = partial.get();
  p.arrivals = reinterpret_cast<uint32_t*>(arrivals.get());
  p.factor = factor.get() + offset * element;
  p.inverses = inverses.get();
  p.right = residuals.get();
  p.residuals = p.keep ? residuals.get() : apart.get();
  p.solved = solved.get();
  finish(coachhook::cholesky_solve(p));
  check_zero(arrivals.get(), arrivals_size);
  write(solved.get(), solved_size);
  write(residuals.get(), residuals_size);
}

// Keys [length, columns] by rows, which are their own targets.
void run_batch() {
  coachhook::BatchParams p;
  p.real = static_cast<coachhook::Real>(read_int());
  p.columns = read_int();
  p.size = read_int();
  const int64_t length = read_int();
  const Bytes from = read_array();
  const int64_t element = p.real == coachhook::Real::kFloat64 ? 8 : 4;
  const Bytes stored[] = {unwritten(p.size * length * element),
                          unwritten(p.size * length * element),
                          unwritten(p.size * length * element)};
  const Bytes at = unwritten(sizeof(int64_t));
  p.keys.from = p.targets.from = from.get();
  p.keys.row_stride = p.targets.row_stride = p.columns;
  p.keys.column_stride = p.targets.column_stride = 1;
  p.keys.length = p.targets.length = length;
  p.keys.by_row = stored[0].get();
  p.keys.by_column = stored[1].get();
  p.targets.by_row = stored[2].get();
  p.at = reinterpret_cast<int64_t*>(at.get());
  finish(coachhook::load_batch(p));
  for (const Bytes& bytes : stored) write(bytes.get(), p.size * length * element);
}

}  // namespace

int main() {
  switch (read_int()) {
    case 0:
      run_rotations();
      return 0;
    case 1:
      run_apply();
      return 0;
    case 2:
      run_invert();
      return 0;
    case 3:
      run_solve();
      return 0;
    case 4:
      run_batch();
      return 0;
  }
  std::fprintf(stderr, "cholesky_driver: unknown case\n");
  return 2;
}
