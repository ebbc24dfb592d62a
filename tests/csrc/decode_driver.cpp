// Runs csrc/decode.cu on the host, see driver.h.
#include "driver.h"

#include "decode.cu"

namespace {

// An array whose first element lies `offset` bytes behind a 16-byte boundary.
struct Shifted {
  Bytes bytes;
  char* data = nullptr;
};

Shifted read_shifted(int64_t offset) {
  const int64_t size = read_int();
  if (size == 0) return {};
  Shifted array{Bytes(new char[offset + size])};
  array.data = array.bytes.get() + offset;
  read(array.data, size);
  return array;
}

coachhook::DType read_dtype() { return static_cast<coachhook::DType>(read_int()); }

}  // namespace

int main() {
  coachhook::DecodeParams p;
  p.dtype = read_dtype();
  p.projection_dtype = read_dtype();
  p.lift_dtype = read_dtype();
  p.y_dtype = read_dtype();
  p.gate.rows = read_int();
  p.depth = read_int();
  p.out_features = read_int();
  p.features = read_int();
  p.x_row_stride = read_int();
  p.weight_row_stride = read_int();
  p.projection_row_stride = read_int();
  p.lift_row_stride = read_int();
  p.gate.reduction = static_cast<coachhook::Reduction>(read_int());
  p.gate.scope = static_cast<coachhook::Scope>(read_int());
  p.gate.sequences = read_int();
  p.own = read_int() != 0;
  p.mean_is_double = p.std_is_double = read_int() != 0;
  p.mean_stride = p.std_stride = read_int();
  const int64_t offset = read_int();
  const bool in_place = read_int() != 0;
  const Shifted x = read_shifted(offset), weight = read_shifted(offset);
  const Shifted projection = read_shifted(offset), lift = read_shifted(offset);
  const Bytes bias = read_array(), base = read_array(), groups = read_array();
  const Bytes cu_seqlens = read_array(), mask = read_array(), mean = read_array();
  const Bytes std = read_array(), alpha = read_array(), state = read_array();
  const Shifted cues = read_shifted(offset);
  const Bytes limits = read_array(), reaches = read_array(), gaps = read_array();
  const Bytes seen = read_array();
  p.x = x.data;
  p.weight = weight.data;
  p.projection = projection.data;
  p.lift = lift.data;
  p.bias = bias.get();
  p.base = base.get();
  p.base_row_stride = p.y_row_stride = p.out_features;
  p.groups = reinterpret_cast<const int64_t*>(groups.get());
  p.mean = mean.get();
  p.std = std.get();
  p.gate.cu_seqlens = reinterpret_cast<const int32_t*>(cu_seqlens.get());
  p.gate.mask = reinterpret_cast<const uint8_t*>(mask.get());
  p.gate.alpha = reinterpret_cast<const float*>(alpha.get());
  p.gate.state = reinterpret_cast<double*>(state.get());
  p.cues = cues.data;
  p.cues_row_stride = p.projection_row_stride;
  p.limits = reinterpret_cast<const float*>(limits.get());
  p.reaches = reinterpret_cast<const int32_t*>(reaches.get());
  p.gaps = reinterpret_cast<const int32_t*>(gaps.get());
  p.seen = reinterpret_cast<int64_t*>(seen.get());

  const size_t y_size = p.gate.rows * p.out_features * coachhook::size_of(p.y_dtype);
  const Bytes z = unwritten(p.gate.rows * 4), y = unwritten(y_size);
  p.gate.z = reinterpret_cast<float*>(z.get());
  p.y = in_place ? base.get() : y.get();
  const Bytes workspace = unwritten(coachhook::decode_workspace(p));
  p.workspace = workspace.get();
  finish(coachhook::decode_hooked_linear(p));
  write(p.y, y_size);
  write(z.get(), p.gate.rows * 4);
  if (state) write(state.get(), p.gate.sequences * 24);
  if (seen) write(seen.get(), p.gate.sequences * (1 + 2 * p.features) * 8);
  return 0;
}
