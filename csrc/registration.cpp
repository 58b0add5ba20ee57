// Op schemas, and the shim that lets Python import this library.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <string>

#include "dispatch.h"
#include "product.h"

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

  // token_loss. "partials" [kPartials, tokens] are those of math/token_loss.h; targets are global
  // ids; columns whose global id is vocab_size or more are padding. Gradients are empty where none
  // was asked for.
  const std::string tokens =
      "Tensor targets, Tensor? mask, Tensor? advantages, Tensor? old_logprobs, "
      "Tensor? ref_logprobs, Tensor? token_weights, Tensor normalizer, Tensor temperature, ";
  const std::string spec =
      "str objective, str kl, float clip_low, float clip_high, float dual_clip, "
      "float kl_coefficient, float entropy_coefficient, float z_loss, ";
  const std::string results = "(Tensor loss, Tensor logprobs, Tensor entropy, Tensor metrics, ";
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };
  define("token_loss(Tensor logits, " + tokens + "int vocab_size, " + spec +
         "bool with_gradient) -> " + results + "Tensor gradient)");
  // The two halves, between which shards are combined and a loss in Python is called. The gradient
  // replaces the logits where none is given; the by_… are the loss's derivatives, [tokens].
  define(
      "token_loss_sums(Tensor logits, Tensor targets, Tensor? mask, Tensor temperature, "
      "int vocab_start, int vocab_size) -> Tensor partials");
  define(
      "token_loss_gradient_(Tensor(a!) logits, Tensor partials, Tensor targets, Tensor? mask, "
      "Tensor by_logprob, Tensor by_entropy, Tensor by_log_z, Tensor temperature, "
      "int vocab_start, int vocab_size, Tensor(b!)? gradient=None) -> ()");
  define("linear_token_loss(Tensor hidden, Tensor weight, " + tokens + "int vocab_size, " + spec +
         "int rows_per_chunk, int kept_gradients_mib, bool drop_masked, bool with_gradient) -> " +
         results + "Tensor grad_hidden, Tensor grad_weight)");
  // Private: adds to grad_weight in forward, for a backward that runs once with gradient 1.
  define(
      "_linear_token_loss_(Tensor hidden, Tensor weight, " + tokens + "int vocab_size, " + spec +
      "int rows_per_chunk, int kept_gradients_mib, bool drop_masked, Tensor(a!) grad_weight) -> " +
      results + "Tensor grad_hidden)");
  // Private: backward of the losses, and whether the graph it runs in is kept for another one.
  define("_scale_gradient_(Tensor(a!) gradient, Tensor factor) -> ()");
  define("_graph_is_kept() -> bool");

  // averaging
  m.def(
      "average_adamw_(Tensor(a!) master, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, *, Tensor lrs, float[] beta1s, float[] beta2s, float[] eps, "
      "Tensor weight_decays, Tensor(d!) steps, Tensor clips, Tensor weights, Tensor? found_inf, "
      "Tensor(e!)? param_out) -> ()");
  m.def(
      "adamw_update_(Tensor master, Tensor grad, Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, *, "
      "Tensor lr, float beta1, float beta2, float eps, Tensor weight_decay, Tensor(c!) steps, "
      "Tensor clip, Tensor? found_inf, Tensor(d!) delta) -> ()");
  m.def(
      "replica_average_pack(Tensor input, Tensor weight, Tensor? found_inf, Tensor(a!) packed) -> "
      "(Tensor squared_norm, Tensor found_inf)");
  m.def("replica_average_skip_(Tensor(a!) packed, Tensor found_inf) -> ()");
  m.def(
      "replica_average_apply_(Tensor(a!) target, Tensor summed, bool add, Tensor(b!)? param_out) "
      "-> ()");

  // Row r of out becomes std times numbers first + r step, … of those that the key stands for.
  m.def("normal_slice_(Tensor(a!) out, int key, int first, int step, float std) -> ()");

  // decode: one step of cached generation between its matrix products; its attention on CPUs only
  m.def(
      "decode_attention_(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor? table, "
      "Tensor slots, Tensor positions, Tensor cosines, Tensor sines, Tensor? q_weight, "
      "Tensor? k_weight, Tensor? inverse, float eps, float scale, int rows, Tensor(c!) out) -> ()");
  m.def("decode_norm_(Tensor(a!) x, Tensor? y, Tensor weight, float eps, Tensor(b!)? out) -> ()");
  m.def("decode_swiglu_(Tensor gate_up, Tensor(a!) out) -> ()");
  // a product of at most 16 rows; with scales the weight is e4m3
  m.def(
      "narrow_product_(Tensor x, Tensor weight, Tensor? bias, Tensor? scales, bool dependent, "
      "Tensor(a!) out) -> ()");
  // products in fp32 on a CPU: out (+)= a b; x weightᵀ + bias. Their fallback is in ops/product.py.
  m.def("product_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  // causal attention over packed documents, fp32 on a CPU; lse is for backward
  m.def(
      "packed_attention(Tensor q, Tensor k, Tensor v, Tensor offsets, float scale) -> "
      "(Tensor out, Tensor lse)");
  m.def(
      "packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor offsets, float scale) -> "
      "(Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def("e4m3_rows_(Tensor x, Tensor(a!) values, Tensor(b!) scales) -> ()");
  // on both: heads into q and the cache, whose pages a table may name; the halves of attention over
  // a shared and an own part; the end of a step
  m.def(
      "decode_heads_(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor? table, Tensor slots, "
      "Tensor positions, Tensor cosines, Tensor sines, Tensor? q_weight, Tensor? k_weight, "
      "Tensor? sums, int ranks, float eps, Tensor(c!) q) -> ()");
  m.def(
      "merge_attention(Tensor a, Tensor a_lse, Tensor b, Tensor b_lse) -> (Tensor out, Tensor "
      "lse)");
  m.def(
      "decode_advance_(Tensor drawn, Tensor logprob, Tensor sampled_logprob, Tensor ends, "
      "Tensor last_positions, int idle_slot, Tensor(a!) tokens, Tensor(b!) positions, "
      "Tensor(c!) slots, Tensor(d!) keys, Tensor(e!) frozen, Tensor(f!) step, Tensor(g!) history, "
      "Tensor(h!) logprobs) -> ()");
  // the whole step where a rank holds all heads; matrices in panels, see cpu/packed_product.h
  m.def(
      "decode_step_(Tensor(a!) x, Tensor? tokens, Tensor? embedding, Tensor qkv, Tensor? qkv_bias, "
      "Tensor o, Tensor gate_up, Tensor down, Tensor attention_norm, Tensor mlp_norm, "
      "Tensor? q_norm, Tensor? k_norm, Tensor? norm, Tensor? head, Tensor(b!) keys, "
      "Tensor(c!) values, Tensor? table, Tensor slots, Tensor positions, Tensor cosines, "
      "Tensor sines, float eps, float scale, int heads, int intermediate, bool post, int rows, "
      "Tensor(d!) scratch, Tensor(e!)? logits) -> ()");

  // elementwise. "inverse" is 1 / rms of each norm, for backward; gradients of weights are empty
  // where none was asked for. Both are in fp32 for bfloat16.
  m.def(
      "rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual=None) -> "
      "(Tensor y, Tensor inverse)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse, bool with_weight) "
      "-> (Tensor grad_x, Tensor grad_weight)");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor");
  // Private: without autograd; the values go past it. Where a norm spans the heads of several
  // ranks, "sums" [tokens, 2] are those that the ops of that name return, added over the ranks.
  m.def(
      "_heads(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, int heads, "
      "int kv_heads, float eps, Tensor? sums=None, int ranks=1) -> "
      "(Tensor q, Tensor k, Tensor inverse)");
  m.def("_heads_sums(Tensor qkv, int heads, int kv_heads) -> Tensor");
  m.def(
      "_heads_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor qkv, Tensor? q_weight, "
      "Tensor? k_weight, Tensor cos, Tensor sin, Tensor inverse, bool with_weights, "
      "Tensor? sums=None, int ranks=1) -> "
      "(Tensor grad_qkv, Tensor grad_q_weight, Tensor grad_k_weight)");
  m.def(
      "_heads_backward_sums(Tensor grad_q, Tensor grad_k, Tensor qkv, Tensor q_weight, "
      "Tensor k_weight, Tensor cos, Tensor sin) -> Tensor sums");
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

static PyObject* own_products(PyObject*, PyObject*) {
  return PyBool_FromLong(megarlx::own_products());
}

static PyMethodDef methods[] = {
    {"load_cpu_kernels", load_cpu_kernels, METH_O, "Loads the kernels of one instruction set."},
    {"own_products", own_products, METH_NOARGS, "Whether products in fp32 are our own."},
    {nullptr, nullptr, 0, nullptr},
};
static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
