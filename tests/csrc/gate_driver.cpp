// Runs csrc/gate.cu on the host, see driver.h.
#include "driver.h"

#include "gate.cu"

namespace {

void run_gate() {
  coachhook::GateParams p;
  p.dtype = static_cast<coachhook::DType>(read_int());
  p.rows = read_int();
  p.rank = read_int();
  p.row_stride = read_int();
  p.reduction = static_cast<coachhook::Reduction>(read_int());
  p.scope = static_cast<coachhook::Scope>(read_int());
  p.sequences = read_int();
  p.population_stride = read_int();
  const bool with_state = read_int() != 0;
  // Elements in front of the matrix move it off a 16-byte boundary.
  const int64_t offset = read_int();
  const Bytes coefficients = read_array(), cu_seqlens = read_array(), mask = read_array();
  const Bytes mean = read_array(), std = read_array(), alpha = read_array();
  const size_t element = p.dtype == coachhook::DType::kFloat32 ? 4 : 2;
  if (coefficients) p.coefficients = coefficients.get() + offset * element;
  p.cu_seqlens = reinterpret_cast<const int32_t*>(cu_seqlens.get());
  p.mask = reinterpret_cast<const uint8_t*>(mask.get());
  p.mean = reinterpret_cast<const double*>(mean.get());
  p.std = reinterpret_cast<const double*>(std.get());
  p.alpha = reinterpret_cast<const float*>(alpha.get());
  const Bytes magnitude = unwritten(p.rows * 4), z = unwritten(p.rows * 4);
  const Bytes fired = unwritten(p.rows), state = unwritten(p.sequences * 24);
  p.magnitude = reinterpret_cast<float*>(magnitude.get());
  p.z = reinterpret_cast<float*>(z.get());
  p.fired = reinterpret_cast<uint8_t*>(fired.get());
  if (with_state) p.state = reinterpret_cast<double*>(state.get());
  finish(coachhook::row_norm_zscore_gate(p));
  write(magnitude.get(), p.rows * 4);
  write(z.get(), p.rows * 4);
  write(fired.get(), p.rows);
  write(state.get(), p.sequences * 24);
}

void run_correction() {
  coachhook::CorrectionParams p;
  p.dtype = static_cast<coachhook::DType>(read_int());
  p.rows = read_int();
  p.out_features = read_int();
  p.y_row_stride = read_int();
  p.rank = read_int();
  p.q_row_stride = read_int();
  p.s_row_stride = read_int();
  const int64_t y_size = read_int();
  const Bytes y(new char[y_size]);
  read(y.get(), y_size);
  const Bytes q = read_array(), s = read_array(), fired = read_array();
  p.y = y.get();
  p.q = reinterpret_cast<const float*>(q.get());
  p.s = reinterpret_cast<const float*>(s.get());
  p.fired = reinterpret_cast<const uint8_t*>(fired.get());
  finish(coachhook::add_correction(p));
  write(y.get(), y_size);
}

}  // namespace

int main() {
  switch (read_int()) {
    case 0:
      run_gate();
      return 0;
    case 1:
      run_correction();
      return 0;
  }
  std::fprintf(stderr, "gate_driver: unknown case\n");
  return 2;
}
