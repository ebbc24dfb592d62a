// The kernels of the edit memory in the module coachhook._C; see bindings.cpp.
#include "append.h"
#include "bindings.h"
#include "cholesky.h"

namespace ch = coachhook;

namespace {

void cholesky_invert(ch::Real real, int64_t n, int64_t rows, uintptr_t factor, int64_t row_stride,
                     int64_t column_stride, uintptr_t inverses, uintptr_t scratch,
                     uintptr_t arrivals, int device, uintptr_t stream) {
  ch::InverseParams p;
  p.real = real;
  p.n = n;
  p.rows = rows;
  p.factor = pointer<const void>(factor);
  p.row_stride = row_stride;
  p.column_stride = column_stride;
  p.inverses = pointer<void>(inverses);
  p.scratch = pointer<void>(scratch);
  p.arrivals = pointer<uint32_t>(arrivals);
  p.device = device;
  p.stream = pointer<void>(stream);
  raise_unless_ok(ch::cholesky_invert(p));
}

void cholesky_solve(ch::Real real, int64_t n, int64_t rows, int64_t columns, bool transposed,
                    bool keep, uintptr_t factor, int64_t row_stride, int64_t column_stride,
                    uintptr_t inverses, uintptr_t right, uintptr_t residuals, uintptr_t solved,
                    int64_t workers, uintptr_t partial, uintptr_t arrivals, int device,
                    uintptr_t stream) {
  ch::SolveParams p;
  p.real = real;
  p.n = n;
  p.rows = rows;
  p.columns = columns;
  p.transposed = transposed;
  p.keep = keep;
  p.factor = pointer<const void>(factor);
  p.row_stride = row_stride;
  p.column_stride = column_stride;
  p.inverses = pointer<const void>(inverses);
  p.right = pointer<const void>(right);
  p.residuals = pointer<void>(residuals);
  p.solved = pointer<void>(solved);
  p.workers = workers;
  p.partial = pointer<void>(partial);
  p.arrivals = pointer<uint32_t>(arrivals);
  p.device = device;
  p.stream = pointer<void>(stream);
  raise_unless_ok(ch::cholesky_solve(p));
}

void cholesky_rotations(ch::Real real, int64_t n, int64_t keys, int64_t columns, int sign,
                        uintptr_t solved, uintptr_t sums, uintptr_t factor, int64_t diagonal_stride,
                        double margin, double pivot_limit, uintptr_t rotations, uintptr_t inverse,
                        uintptr_t status, int device, uintptr_t stream) {
  ch::RotationParams p;
  p.real = real;
  p.n = n;
  p.keys = keys;
  p.columns = columns;
  p.sign = sign;
  p.solved = pointer<const void>(solved);
  p.sums = pointer<void>(sums);
  p.factor = pointer<const void>(factor);
  p.diagonal_stride = diagonal_stride;
  p.margin = margin;
  p.pivot_limit = pivot_limit;
  p.rotations = pointer<void>(rotations);
  p.inverse = pointer<void>(inverse);
  p.status = pointer<int32_t>(status);
  p.device = device;
  p.stream = pointer<void>(stream);
  raise_unless_ok(ch::cholesky_rotations(p));
}

void cholesky_apply(ch::Real real, int64_t n, int64_t columns, uintptr_t factor, int64_t row_stride,
                    int64_t column_stride, uintptr_t residuals, int64_t chunk, uintptr_t solved,
                    uintptr_t rotations, uintptr_t status, int device, uintptr_t stream) {
  ch::ApplyParams p;
  p.real = real;
  p.n = n;
  p.columns = columns;
  p.factor = pointer<void>(factor);
  p.row_stride = row_stride;
  p.column_stride = column_stride;
  p.residuals = pointer<const void>(residuals);
  p.chunk = chunk;
  p.solved = pointer<const void>(solved);
  p.rotations = pointer<const void>(rotations);
  p.status = pointer<const int32_t>(status);
  p.device = device;
  p.stream = pointer<void>(stream);
  raise_unless_ok(ch::cholesky_apply(p));
}

void load_batch(ch::Real real, int64_t columns, int64_t size, uintptr_t keys, int64_t features,
                int64_t keys_row_stride, int64_t keys_column_stride, uintptr_t key_rows,
                uintptr_t right, uintptr_t targets, int64_t out_features,
                int64_t targets_row_stride, int64_t targets_column_stride, uintptr_t target_rows,
                int64_t row, uintptr_t at, int device, uintptr_t stream) {
  ch::BatchParams p;
  p.real = real;
  p.columns = columns;
  p.size = size;
  p.keys.from = pointer<const void>(keys);
  p.keys.length = features;
  p.keys.row_stride = keys_row_stride;
  p.keys.column_stride = keys_column_stride;
  p.keys.by_row = pointer<void>(key_rows);
  p.keys.by_column = pointer<void>(right);
  p.targets.from = pointer<const void>(targets);
  p.targets.length = out_features;
  p.targets.row_stride = targets_row_stride;
  p.targets.column_stride = targets_column_stride;
  p.targets.by_row = pointer<void>(target_rows);
  p.row = row;
  p.at = pointer<int64_t>(at);
  p.device = device;
  p.stream = pointer<void>(stream);
  raise_unless_ok(ch::load_batch(p));
}

}  // namespace

void bind_cholesky(py::module_& m) {
  py::enum_<ch::Real>(m, "Real", py::module_local())
      .value("float32", ch::Real::kFloat32)
      .value("float64", ch::Real::kFloat64);
  m.attr("CHOLESKY_WIDTH") = ch::kPanelWidth;
  m.attr("CHOLESKY_ARRIVALS") = ch::kArrivals;
  m.def("cholesky_invert", &cholesky_invert, py::kw_only(), py::arg("real"), py::arg("n"),
        py::arg("rows"), py::arg("factor"), py::arg("row_stride"), py::arg("column_stride"),
        py::arg("inverses"), py::arg("scratch"), py::arg("arrivals"), py::arg("device"),
        py::arg("stream"));
  m.def("cholesky_solve", &cholesky_solve, py::kw_only(), py::arg("real"), py::arg("n"),
        py::arg("rows"), py::arg("columns"), py::arg("transposed"), py::arg("keep"),
        py::arg("factor"), py::arg("row_stride"), py::arg("column_stride"), py::arg("inverses"),
        py::arg("right"), py::arg("residuals"), py::arg("solved"), py::arg("workers"),
        py::arg("partial"), py::arg("arrivals"), py::arg("device"), py::arg("stream"));
  m.def("cholesky_rotations", &cholesky_rotations, py::kw_only(), py::arg("real"), py::arg("n"),
        py::arg("keys"), py::arg("columns"), py::arg("sign"), py::arg("solved"), py::arg("sums"),
        py::arg("factor"), py::arg("diagonal_stride"), py::arg("margin"), py::arg("pivot_limit"),
        py::arg("rotations"), py::arg("inverse"), py::arg("status"), py::arg("device"),
        py::arg("stream"));
  m.def("cholesky_apply", &cholesky_apply, py::kw_only(), py::arg("real"), py::arg("n"),
        py::arg("columns"), py::arg("factor"), py::arg("row_stride"), py::arg("column_stride"),
        py::arg("residuals"), py::arg("chunk"), py::arg("solved"), py::arg("rotations"),
        py::arg("status"), py::arg("device"), py::arg("stream"));
  m.def("load_batch", &load_batch, py::kw_only(), py::arg("real"), py::arg("columns"),
        py::arg("size"), py::arg("keys"), py::arg("features"), py::arg("keys_row_stride"),
        py::arg("keys_column_stride"), py::arg("key_rows"), py::arg("right"), py::arg("targets"),
        py::arg("out_features"), py::arg("targets_row_stride"), py::arg("targets_column_stride"),
        py::arg("target_rows"), py::arg("row"), py::arg("at"), py::arg("device"),
        py::arg("stream"));
}
