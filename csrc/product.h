// Products of matrices, for bindings that make some: our own kernel where it is the faster one.
#pragma once
#include <ATen/core/Tensor.h>

namespace megarlx {

// Whether this machine's products in fp32 are our own: said once, here and for Python.
bool own_products();

// out (+)= a b, by our kernel: of matrices in fp32 on a CPU
void own_product_(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool add);

// out (+)= a b, by whichever is the faster one: of matrices of one type on one device
void product_(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool add = false);

}  // namespace megarlx
