// One register_* function per topic; module.cpp calls them all.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace megatron_7b {

void register_errors(pybind11::module_& module);
void register_writer(pybind11::module_& module);
void register_corpus(pybind11::module_& module);
void register_sampling(pybind11::module_& module);
void register_packing(pybind11::module_& module);
void register_text(pybind11::module_& module);

}  // namespace megatron_7b
