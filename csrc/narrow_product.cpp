// A product of few rows with a matrix that is read once. On a CPU it is torch's own product.
#include "math/narrow_product.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include "dispatch.h"
#ifdef MEGARLX_CUDA
#include "cuda/launchers.h"
#include "cuda/stream.h"
#endif

namespace megarlx {
namespace {
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "narrow_product_";
constexpr std::int64_t kMostColumns = 1 << 28;  // the last one's index fits into an int

void check(const char* name, const Tensor& t, at::ScalarType type, at::IntArrayRef shape,
           const Tensor& like) {
  MEGARLX_CHECK(kOp, t.scalar_type() == type, name, t.scalar_type(), type);
  MEGARLX_CHECK(kOp, t.device() == like.device(), name, t.device(), like.device());
  MEGARLX_CHECK(kOp, t.sizes() == shape, name, c10::str("of shape ", t.sizes()), shape);
  MEGARLX_CHECK(kOp, t.is_contiguous(), name, c10::str("strided ", t.strides()), "contiguous");
}

Dtype checked_dtype(const Tensor& x, bool scaled) {
  const auto type = x.scalar_type();
  const bool cpu = x.is_cpu(), narrow = type == at::kBFloat16 && !cpu;
  const bool wide = type == at::kFloat || type == at::kDouble;
  MEGARLX_CHECK(kOp, narrow || (wide && (cpu || !scaled)), "x", type,
                "Float, Double, and on CUDA BFloat16, which scales go with there");
  return narrow ? Dtype::kBFloat16 : type == at::kDouble ? Dtype::kFloat64 : Dtype::kFloat32;
}

void product_of_torch(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& scales, Tensor out) {
  if (scales) {
    at::mm_out(out, x, weight.to(x.scalar_type()).t());
    out.mul_(*scales);
    if (bias) out.add_(*bias);
  } else if (bias) {
    at::addmm_out(out, *bias, x, weight.t(), 1, 1);
  } else {
    at::mm_out(out, x, weight.t());
  }
}

void narrow_product_(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& scales, bool dependent, Tensor out) {
  MEGARLX_CHECK(kOp, x.dim() == 2 && x.size(0) <= kMostNarrowRows && x.size(1) <= kMostColumns, "x",
                c10::str("of shape ", x.sizes()),
                c10::str("[at most ", kMostNarrowRows, ", at most ", kMostColumns, "]"));
  MEGARLX_CHECK(kOp, weight.dim() == 2, "weight", c10::str("of shape ", weight.sizes()),
                c10::str("[outputs, ", x.size(1), "]"));
  const auto rows = x.size(0), columns = x.size(1), outputs = weight.size(0);
  const auto type = x.scalar_type();
  [[maybe_unused]] const Dtype dtype = checked_dtype(x, scales.has_value());
  check("x", x, type, x.sizes(), x);
  check("weight", weight, scales ? at::kFloat8_e4m3fn : type, {outputs, columns}, x);
  if (bias) check("bias", *bias, type, {outputs}, x);
  if (scales) check("scales", *scales, at::kFloat, {outputs}, x);
  check("out", out, type, {rows, outputs}, x);
#ifdef MEGARLX_CUDA
  if (!x.is_cpu()) {
    NarrowProductArgs args{dtype, rows, columns, outputs};
    args.x = x.const_data_ptr();
    args.weight = weight.const_data_ptr();
    args.bias = bias ? bias->const_data_ptr() : nullptr;
    args.scales = scales ? scales->const_data_ptr<float>() : nullptr;
    args.out = out.mutable_data_ptr();
    args.dependent = dependent;
    const cuda::OnDevice device(x.device());
    cuda::narrow_product(args, device.stream());
    return device.check(kOp);
  }
#endif
  product_of_torch(x, weight, bias, scales, out);
}

void implement(torch::Library& m) { m.impl("narrow_product_", narrow_product_); }

TORCH_LIBRARY_IMPL(megarlx, CPU, m) { implement(m); }
#ifdef MEGARLX_CUDA
TORCH_LIBRARY_IMPL(megarlx, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace megarlx
