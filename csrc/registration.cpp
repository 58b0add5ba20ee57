// Op schemas, and the shim that lets Python import this library.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <torch/library.h>

#include "dispatch.h"

TORCH_LIBRARY(megarlx, m) {
  // sample
  m.def(
      "sample(Tensor logits, Tensor seed, Tensor keys, Tensor temperature, Tensor? top_k, "
      "Tensor? top_p, Tensor? min_p, int vocab_size) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sample_partials(Tensor logits, Tensor seed, Tensor keys, Tensor temperature, int first_id, "
      "int vocab_size) -> Tensor");
  m.def("sample_combine(Tensor partials, Tensor temperature) -> (Tensor, Tensor, Tensor)");
  m.def("philox(Tensor counters, Tensor key) -> Tensor");
  m.def("gumbel(Tensor bits) -> Tensor");

  // token_loss

  // averaging
}

namespace megarlx {
namespace {
const cpu::Kernels* chosen = nullptr;
}

const cpu::Kernels& cpu_kernels() {
  TORCH_CHECK(chosen != nullptr, "megarlx: no CPU kernels are loaded; import megarlx.ops first");
  return *chosen;
}
}  // namespace megarlx

// load_cpu_kernels(path) -> the instruction set's name
static PyObject* load_cpu_kernels(PyObject*, PyObject* argument) {
  const char* path = PyUnicode_AsUTF8(argument);
  if (path == nullptr) return nullptr;
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return PyErr_Format(PyExc_ImportError, "megarlx: %s", dlerror());
  auto get =
      reinterpret_cast<const megarlx::cpu::Kernels* (*)()>(dlsym(library, "megarlx_cpu_kernels"));
  if (get == nullptr) return PyErr_Format(PyExc_ImportError, "megarlx: %s: %s", path, dlerror());
  const auto* table = get();
  if (table->version != megarlx::cpu::kKernelsVersion)
    return PyErr_Format(PyExc_ImportError,
                        "megarlx: %s holds kernels of version %lld, this build wants %lld; rebuild",
                        path, static_cast<long long>(table->version),
                        static_cast<long long>(megarlx::cpu::kKernelsVersion));
  megarlx::chosen = table;
  return PyUnicode_FromString(table->instruction_set);
}

static PyMethodDef methods[] = {
    {"load_cpu_kernels", load_cpu_kernels, METH_O, "Loads the kernels of one instruction set."},
    {nullptr, nullptr, 0, nullptr},
};
static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
