// Matrix products whose result is wider than their factors, which torch has on CUDA only. Included
// before every binding.
#pragma once
#include <ATen/ATen.h>

namespace emulated {

inline at::Tensor& mm_out(at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  return at::mm_out(out, a, b);
}
inline at::Tensor& mm_out(at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                          at::ScalarType wide) {
  return at::mm_out(out, a.to(wide), b.to(wide));
}
inline at::Tensor& addmm_out(at::Tensor& out, const at::Tensor& self, const at::Tensor& a,
                             const at::Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  return at::addmm_out(out, self, a, b, beta, alpha);
}
inline at::Tensor& addmm_out(at::Tensor& out, const at::Tensor& self, const at::Tensor& a,
                             const at::Tensor& b, at::ScalarType wide, const at::Scalar& beta,
                             const at::Scalar& alpha) {
  return at::addmm_out(out, self, a.to(wide), b.to(wide), beta, alpha);
}

}  // namespace emulated
