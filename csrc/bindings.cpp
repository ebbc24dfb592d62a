// Python module coachhook._C: numbers in, exceptions out. No torch symbols, so that one build
// serves every torch version; pointers and the stream arrive as integers, checked by the Python
// side.
#include "bindings.h"

#include "gate.h"

namespace ch = coachhook;

namespace {

void row_norm_zscore_gate(uintptr_t coefficients, ch::DType dtype, int64_t rows, int64_t rank,
                          int64_t row_stride, ch::Reduction reduction, ch::Scope scope,
                          int64_t sequences, uintptr_t cu_seqlens, uintptr_t mask, uintptr_t mean,
                          uintptr_t std, int64_t population_stride, uintptr_t alpha,
                          float alpha_value, uintptr_t state, uintptr_t magnitude, uintptr_t z,
                          uintptr_t fired, int device, uintptr_t stream) {
  ch::GateParams p;
  p.coefficients = pointer<const void>(coefficients);
  p.dtype = dtype;
  p.rows = rows;
  p.rank = rank;
  p.row_stride = row_stride;
  p.reduction = reduction;
  p.scope = scope;
  p.sequences = sequences;
  p.cu_seqlens = pointer<const int32_t>(cu_seqlens);
  p.mask = pointer<const uint8_t>(mask);
  p.mean = pointer<const double>(mean);
  p.std = pointer<const double>(std);
  p.population_stride = population_stride;
  p.alpha = pointer<const float>(alpha);
  p.alpha_value = alpha_value;
  p.state = pointer<double>(state);
  p.magnitude = pointer<float>(magnitude);
  p.z = pointer<float>(z);
  p.fired = pointer<uint8_t>(fired);
  p.device = device;
  p.stream = pointer<void>(stream);
  raise_unless_ok(ch::row_norm_zscore_gate(p));
}

void add_correction(uintptr_t y, ch::DType dtype, int64_t rows, int64_t out_features,
                    int64_t y_row_stride, int64_t rank, uintptr_t q, int64_t q_row_stride,
                    uintptr_t s, int64_t s_row_stride, uintptr_t fired, int device,
                    uintptr_t stream) {
  ch::CorrectionParams p;
  p.y = pointer<void>(y);
  p.dtype = dtype;
  p.rows = rows;
  p.out_features = out_features;
  p.y_row_stride = y_row_stride;
  p.rank = rank;
  p.q = pointer<const float>(q);
  p.q_row_stride = q_row_stride;
  p.s = pointer<const float>(s);
  p.s_row_stride = s_row_stride;
  p.fired = pointer<const uint8_t>(fired);
  p.device = device;
  p.stream = pointer<void>(stream);
  raise_unless_ok(ch::add_correction(p));
}

py::dict build_info() {
  const ch::CudaVersions versions = ch::cuda_versions();
  py::dict info;
  info["version"] = COACHHOOK_VERSION;
  info["architectures"] = COACHHOOK_ARCHITECTURES;
  info["cuda_runtime"] = versions.runtime;
  info["cuda_driver"] = versions.driver;
  info["devices"] = versions.devices;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of coachhook on raw pointers. The checked face is coachhook.ops.";

  // Local to this module: another build of it in the same process has its own.
  py::enum_<ch::DType>(m, "DType", py::module_local())
      .value("float32", ch::DType::kFloat32)
      .value("float16", ch::DType::kFloat16)
      .value("bfloat16", ch::DType::kBFloat16);
  py::enum_<ch::Reduction>(m, "Reduction", py::module_local())
      .value("norm", ch::Reduction::kNorm)
      .value("max", ch::Reduction::kMax);
  py::enum_<ch::Scope>(m, "Scope", py::module_local())
      .value("sequence", ch::Scope::kSequence)
      .value("population", ch::Scope::kPopulation)
      .value("direct", ch::Scope::kDirect)
      .value("prefix", ch::Scope::kPrefix)
      .value("ungated", ch::Scope::kUngated);

  m.def("row_norm_zscore_gate", &row_norm_zscore_gate, py::kw_only(), py::arg("coefficients"),
        py::arg("dtype"), py::arg("rows"), py::arg("rank"), py::arg("row_stride"),
        py::arg("reduction"), py::arg("scope"), py::arg("sequences"), py::arg("cu_seqlens"),
        py::arg("mask"), py::arg("mean"), py::arg("std"), py::arg("population_stride"),
        py::arg("alpha"), py::arg("alpha_value"), py::arg("state"), py::arg("magnitude"),
        py::arg("z"), py::arg("fired"), py::arg("device"), py::arg("stream"));
  m.def("add_correction", &add_correction, py::kw_only(), py::arg("y"), py::arg("dtype"),
        py::arg("rows"), py::arg("out_features"), py::arg("y_row_stride"), py::arg("rank"),
        py::arg("q"), py::arg("q_row_stride"), py::arg("s"), py::arg("s_row_stride"),
        py::arg("fired"), py::arg("device"), py::arg("stream"));
  bind_cholesky(m);
  bind_decode(m);
  m.def("build_info", &build_info,
        "Version, GPU architectures and CUDA versions of this build; creates no CUDA context.");
}
