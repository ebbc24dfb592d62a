// Decoding in the module coachhook._C.
#include "bindings.h"
#include "decode.h"

namespace ch = coachhook;

namespace {

int64_t decode_workspace(int64_t rows, int64_t depth, int64_t out_features, int64_t features,
                         ch::DType dtype, ch::DType projection_dtype, int64_t sequences,
                         bool frozen, bool lifted, bool own, bool cued) {
  ch::DecodeParams p;
  // Only null or not matters of a pointer.
  const char given = 0;
  p.gate.rows = rows;
  p.gate.sequences = sequences;
  p.gate.state = reinterpret_cast<double*>(const_cast<char*>(&given));
  p.depth = depth;
  p.out_features = out_features;
  p.features = features;
  p.dtype = dtype;
  p.projection_dtype = projection_dtype;
  p.weight = frozen ? &given : nullptr;
  p.lift = lifted ? &given : nullptr;
  p.gate.reduction = own ? ch::Reduction::kMax : ch::Reduction::kNorm;
  p.own = own;
  p.cues = cued ? &given : nullptr;
  return ch::decode_workspace(p);
}

void decode_hooked_linear(uintptr_t x, ch::DType dtype, int64_t rows, int64_t depth,
                          int64_t x_row_stride, int64_t out_features, uintptr_t weight,
                          int64_t weight_row_stride, uintptr_t bias, uintptr_t base,
                          int64_t base_row_stride, uintptr_t projection, ch::DType projection_dtype,
                          int64_t features, int64_t projection_row_stride, uintptr_t lift,
                          ch::DType lift_dtype, int64_t lift_row_stride, uintptr_t groups, bool own,
                          uintptr_t cues, int64_t cues_row_stride, uintptr_t limits,
                          uintptr_t reaches, uintptr_t gaps, uintptr_t seen,
                          ch::Reduction reduction, ch::Scope scope, int64_t sequences,
                          uintptr_t cu_seqlens, uintptr_t mask, uintptr_t mean, uintptr_t std,
                          bool mean_is_double, bool std_is_double, int64_t mean_stride,
                          int64_t std_stride, uintptr_t alpha, float alpha_value, uintptr_t state,
                          uintptr_t y, ch::DType y_dtype, int64_t y_row_stride, uintptr_t z,
                          uintptr_t workspace, bool overlap, int device, uintptr_t stream) {
  ch::DecodeParams p;
  p.x = pointer<const void>(x);
  p.dtype = dtype;
  p.depth = depth;
  p.x_row_stride = x_row_stride;
  p.out_features = out_features;
  p.weight = pointer<const void>(weight);
  p.weight_row_stride = weight_row_stride;
  p.bias = pointer<const void>(bias);
  p.base = pointer<const void>(base);
  p.base_row_stride = base_row_stride;
  p.projection = pointer<const void>(projection);
  p.projection_dtype = projection_dtype;
  p.features = features;
  p.projection_row_stride = projection_row_stride;
  p.lift = pointer<const void>(lift);
  p.lift_dtype = lift_dtype;
  p.lift_row_stride = lift_row_stride;
  p.groups = pointer<const int64_t>(groups);
  p.own = own;
  p.cues = pointer<const void>(cues);
  p.cues_row_stride = cues_row_stride;
  p.limits = pointer<const float>(limits);
  p.reaches = pointer<const int32_t>(reaches);
  p.gaps = pointer<const int32_t>(gaps);
  p.seen = pointer<int64_t>(seen);
  p.mean = pointer<const void>(mean);
  p.std = pointer<const void>(std);
  p.mean_is_double = mean_is_double;
  p.std_is_double = std_is_double;
  p.mean_stride = mean_stride;
  p.std_stride = std_stride;
  p.gate.rows = rows;
  p.gate.reduction = reduction;
  p.gate.scope = scope;
  p.gate.sequences = sequences;
  p.gate.cu_seqlens = pointer<const int32_t>(cu_seqlens);
  p.gate.mask = pointer<const uint8_t>(mask);
  p.gate.alpha = pointer<const float>(alpha);
  p.gate.alpha_value = alpha_value;
  p.gate.state = pointer<double>(state);
  p.gate.z = pointer<float>(z);
  p.gate.device = device;
  p.gate.stream = pointer<void>(stream);
  p.y = pointer<void>(y);
  p.y_dtype = y_dtype;
  p.y_row_stride = y_row_stride;
  p.workspace = pointer<void>(workspace);
  p.overlap = overlap;
  raise_unless_ok(ch::decode_hooked_linear(p));
}

}  // namespace

void bind_decode(py::module_& m) {
  m.attr("DECODE_TOKENS") = ch::kDecodeTokens;
  m.attr("DECODE_KEYS") = ch::kDecodeKeys;
  m.def("decode_workspace", &decode_workspace, py::kw_only(), py::arg("rows"), py::arg("depth"),
        py::arg("out_features"), py::arg("features"), py::arg("dtype"), py::arg("projection_dtype"),
        py::arg("sequences"), py::arg("frozen"), py::arg("lifted"), py::arg("own"), py::arg("cued"),
        "Bytes of workspace that decode_hooked_linear needs for these sizes, at most.");
  m.def("decode_hooked_linear", &decode_hooked_linear, py::kw_only(), py::arg("x"),
        py::arg("dtype"), py::arg("rows"), py::arg("depth"), py::arg("x_row_stride"),
        py::arg("out_features"), py::arg("weight"), py::arg("weight_row_stride"), py::arg("bias"),
        py::arg("base"), py::arg("base_row_stride"), py::arg("projection"),
        py::arg("projection_dtype"), py::arg("features"), py::arg("projection_row_stride"),
        py::arg("lift"), py::arg("lift_dtype"), py::arg("lift_row_stride"), py::arg("groups"),
        py::arg("own"), py::arg("cues"), py::arg("cues_row_stride"), py::arg("limits"),
        py::arg("reaches"), py::arg("gaps"), py::arg("seen"), py::arg("reduction"),
        py::arg("scope"), py::arg("sequences"), py::arg("cu_seqlens"), py::arg("mask"),
        py::arg("mean"), py::arg("std"), py::arg("mean_is_double"), py::arg("std_is_double"),
        py::arg("mean_stride"), py::arg("std_stride"), py::arg("alpha"), py::arg("alpha_value"),
        py::arg("state"), py::arg("y"), py::arg("y_dtype"), py::arg("y_row_stride"), py::arg("z"),
        py::arg("workspace"), py::arg("overlap"), py::arg("device"), py::arg("stream"));
}
