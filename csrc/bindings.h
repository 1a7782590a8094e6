// What the files of the Python module share. Together they convert arguments and release the GIL; no logic.
// engine/_kernels.pyi is their documentation.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <span>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "program.h"

namespace kt {

template <class T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

// Views of arguments that are bound with noconvert: a silent copy would lose what is written to it.
template <class T>
std::span<const T> view(const Array<T>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

template <class T>
std::span<T> writable(Array<T>& array) {
  return {array.mutable_data(), static_cast<size_t>(array.size())};
}

const KernelTable& table_of(const std::string& isa);
op::Act act_named(const std::string& where, const std::string& act);

// Ops as engine/executors/native.py gives them: (kind, fields in order).
std::vector<Op> ops_of(const std::vector<pybind11::tuple>& tuples);

// Program and sampling.
void bind_program(pybind11::module_& m);

}  // namespace kt
