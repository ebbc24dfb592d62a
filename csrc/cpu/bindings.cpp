// Python module coachhook._cpu: numbers in, exceptions out, no torch symbols, as coachhook._C.
// Pointers arrive as integers, checked by the Python side.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "pair_product.h"

namespace py = pybind11;
namespace ch = coachhook;

namespace {

void pair_product(uintptr_t x, int64_t x_row_stride, int64_t tokens, int64_t n, uintptr_t s,
                  int64_t s_row_stride, int64_t rank, uintptr_t features, uintptr_t norms) {
  if (!ch::has_pair_product()) {
    throw std::runtime_error("pair_product: this processor has no AVX-512 for bfloat16");
  }
  if (rank < 1 || rank > ch::kMaxRank) {
    throw std::invalid_argument("pair_product: rank must be 1 to " + std::to_string(ch::kMaxRank));
  }
  ch::PairProductParams p;
  p.x = reinterpret_cast<const uint16_t*>(x);
  p.x_row_stride = x_row_stride;
  p.tokens = tokens;
  p.n = n;
  p.s = reinterpret_cast<const float*>(s);
  p.s_row_stride = s_row_stride;
  p.rank = rank;
  p.features = reinterpret_cast<float*>(features);
  p.norms = reinterpret_cast<double*>(norms);
  const py::gil_scoped_release released;
  ch::pair_product(p);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.attr("VERSION") = COACHHOOK_VERSION;
  module.attr("MAX_RANK") = ch::kMaxRank;
  module.def("has_pair_product", &ch::has_pair_product);
  module.def("pair_product", &pair_product, py::kw_only(), py::arg("x"), py::arg("x_row_stride"),
             py::arg("tokens"), py::arg("n"), py::arg("s"), py::arg("s_row_stride"),
             py::arg("rank"), py::arg("features"), py::arg("norms"));
}
