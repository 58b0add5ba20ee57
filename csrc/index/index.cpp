// Sample index and blending for token files.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_index, m) { m.doc() = "Sample index and blending for token files"; }
