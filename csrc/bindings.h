// What the binding files share: pointers out of integers, exceptions out of a Status.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "common/status.h"

namespace py = pybind11;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void raise_unless_ok(const coachhook::Status& status) {
  if (status.code == coachhook::Code::kInvalidArgument) throw py::value_error(status.message);
  if (status.code == coachhook::Code::kCudaError) throw std::runtime_error(status.message);
}

void bind_cholesky(py::module_& m);
void bind_decode(py::module_& m);
