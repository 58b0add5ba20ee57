// _scale_gradient_: the last step of the token losses' backward, in place. A factor of 1, the usual
// one, costs no pass over the gradient, and a GPU is not waited for to learn it.
#include <torch/library.h>

#include "dispatch.h"
#include "token_loss.h"
#ifdef MEGARLX_CUDA
#include "cuda/launchers.h"
#include "cuda/stream.h"
#endif

namespace megarlx {
namespace {

void scale_gradient_(const Tensor& gradient, const Tensor& factor) {
  const char* op = "_scale_gradient_";
  const auto dtype = gradient.scalar_type();
  MEGARLX_CHECK(op, dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16,
                "gradient's dtype", dtype, "float32, float64, bfloat16");
  MEGARLX_CHECK(op, gradient.is_contiguous(), "gradient's strides", gradient.strides(),
                "contiguous");
  MEGARLX_CHECK(op, factor.dim() == 0, "factor's shape", factor.sizes(), "[]");
  MEGARLX_CHECK(op, factor.scalar_type() == precision_of(gradient), "factor's dtype",
                factor.scalar_type(), precision_of(gradient));
  MEGARLX_CHECK(op, factor.device() == gradient.device(), "factor's device", factor.device(),
                gradient.device());
#ifdef MEGARLX_CUDA
  if (gradient.is_cuda()) {
    const cuda::OnDevice device(gradient.device());
    const Dtype stored = dtype == at::kFloat    ? Dtype::kFloat32
                         : dtype == at::kDouble ? Dtype::kFloat64
                                                : Dtype::kBFloat16;
    cuda::scale_gradient(gradient.data_ptr(), stored, gradient.numel(), factor.const_data_ptr(),
                         device.stream());
    device.check(op);
    if (!gradient.is_inference()) gradient.unsafeGetTensorImpl()->bump_version();
    return;
  }
#endif
  if (factor.item<double>() != 1) gradient.mul_(factor.to(dtype));
}

}  // namespace

TORCH_LIBRARY_IMPL(megarlx, CPU, m) { m.impl("_scale_gradient_", scale_gradient_); }
#ifdef MEGARLX_CUDA
TORCH_LIBRARY_IMPL(megarlx, CUDA, m) { m.impl("_scale_gradient_", scale_gradient_); }
#endif

}  // namespace megarlx
