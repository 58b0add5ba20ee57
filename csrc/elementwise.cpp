// Bindings of RMSNorm and SwiGLU: checks, allocation, then the CPU kernels over threads or the CUDA
// ones, which take bfloat16 too.
#include "elementwise.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace megarlx {
namespace {

RmsNormArgs read_norm(const char* op, const Tensor& x) {
  RmsNormArgs args{};
  args.dtype = read_dtype(op, "x", x);
  MEGARLX_CHECK(op, x.dim() == 2 && x.size(1) > 0, "x's shape", x.sizes(),
                "[rows, width] with a width of at least 1");
  args.rows = x.size(0);
  args.width = x.size(1);
  return args;
}

void compute(const char* op, const Tensor& like, const RmsNormArgs& args) {
  MEGARLX_LAUNCH(op, like, args, rms_norm);
  over_rows(args.rows, args.width, [&](std::int64_t begin, std::int64_t end) {
    cpu_kernels().rms_norm(args, begin, end);
  });
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps,
                                    const OptionalTensor& residual) {
  const char* op = "rms_norm";
  RmsNormArgs args = read_norm(op, x);
  MEGARLX_CHECK(op, eps >= 0, "eps", eps, "a number >= 0");
  const Tensor x_rows = x.contiguous(), weights = read(op, "weight", weight, {args.width}, x);
  const Tensor added =
      residual.has_value() ? read(op, "residual", *residual, x.sizes(), x) : Tensor();
  Tensor y = at::empty(x.sizes(), x.options()), inverse = at::empty({args.rows}, precision_of(x));
  args.eps = eps;
  args.x = data(x_rows);
  args.weight = data(weights);
  args.residual = added.defined() ? data(added) : nullptr;
  args.y = written(y);
  args.inverse = written(inverse);
  compute(op, x, args);
  return {y, inverse};
}

void compute_backward(const char* op, const Tensor& like, const RmsNormArgs& args) {
  MEGARLX_LAUNCH(op, like, args, rms_norm_backward);
  over_rows(blocks_of(args.rows), args.width * kRowsPerBlock,
            [&](std::int64_t begin, std::int64_t end) {
              cpu_kernels().rms_norm_backward(args, begin, end);
            });
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& weight, const Tensor& inverse,
                                             bool with_weight) {
  const char* op = "rms_norm_backward";
  RmsNormArgs args = read_norm(op, x);
  const Tensor x_rows = x.contiguous(), weights = read(op, "weight", weight, {args.width}, x);
  const Tensor upstream = read(op, "grad", grad, x.sizes(), x);
  Tensor inverses = read_as(op, "inverse", inverse, {args.rows}, precision_of(x));
  Tensor grad_x = at::empty(x.sizes(), x.options());
  const std::int64_t summed_width = with_weight ? args.width : 0;
  Tensor sums = at::empty({blocks_on(x, args.rows), summed_width}, precision_of(x));
  args.x = data(x_rows);
  args.weight = data(weights);
  args.inverse = const_cast<void*>(data(inverses));
  args.grad = data(upstream);
  args.grad_x = written(grad_x);
  args.weight_sums = with_weight ? written(sums) : nullptr;
  compute_backward(op, x, args);
  return {grad_x, summed(sums, summed_width)};
}

SwiGluArgs read_swiglu(const char* op, const Tensor& gate_up) {
  SwiGluArgs args{};
  args.dtype = read_dtype(op, "gate_up", gate_up);
  MEGARLX_CHECK(op, gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up's shape",
                gate_up.sizes(), "[rows, 2 × width]");
  args.rows = gate_up.size(0);
  args.width = gate_up.size(1) / 2;
  return args;
}

void compute(const char* op, const Tensor& like, const SwiGluArgs& args) {
  MEGARLX_LAUNCH(op, like, args, swiglu);
  over_rows(args.rows, args.width,
            [&](std::int64_t begin, std::int64_t end) { cpu_kernels().swiglu(args, begin, end); });
}

Tensor swiglu(const Tensor& gate_up) {
  SwiGluArgs args = read_swiglu("swiglu", gate_up);
  const Tensor halves = rows_of(gate_up);
  Tensor out = at::empty({args.rows, args.width}, gate_up.options());
  args.gate_up = data(halves);
  args.gate_up_stride = halves.stride(0);
  args.out = written(out);
  compute("swiglu", gate_up, args);
  return out;
}

void compute_backward(const char* op, const Tensor& like, const SwiGluArgs& args) {
  MEGARLX_LAUNCH(op, like, args, swiglu_backward);
  over_rows(args.rows, args.width, [&](std::int64_t begin, std::int64_t end) {
    cpu_kernels().swiglu_backward(args, begin, end);
  });
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& gate_up) {
  const char* op = "swiglu_backward";
  SwiGluArgs args = read_swiglu(op, gate_up);
  const Tensor halves = rows_of(gate_up);
  const Tensor upstream = read(op, "grad", grad, {args.rows, args.width}, gate_up);
  Tensor out = at::empty(gate_up.sizes(), gate_up.options());
  args.gate_up = data(halves);
  args.gate_up_stride = halves.stride(0);
  args.grad = data(upstream);
  args.grad_gate_up = written(out);
  compute_backward(op, gate_up, args);
  return out;
}

void implement(torch::Library& m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
}

TORCH_LIBRARY_IMPL(megarlx, CPU, m) { implement(m); }
#ifdef MEGARLX_CUDA
TORCH_LIBRARY_IMPL(megarlx, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace megarlx
