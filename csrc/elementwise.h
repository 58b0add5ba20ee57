// What the bindings of the elementwise parts of a layer share: checks, and calls of kernels.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <functional>
#include <string>

#include "dispatch.h"
#include "math/elementwise.h"
#ifdef MEGARLX_CUDA
#include "cuda/launchers.h"
#include "cuda/stream.h"
#endif

namespace megarlx {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr std::int64_t kGrain = 1 << 14;  // elements for which another thread is worth waking

Dtype read_dtype(const char* op, const char* name, const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  const bool narrow = dtype == at::kBFloat16 && !tensor.is_cpu();
  MEGARLX_CHECK(op, dtype == at::kFloat || dtype == at::kDouble || narrow,
                std::string(name) + "'s dtype", dtype, "float32, float64, and on CUDA bfloat16");
  return narrow ? Dtype::kBFloat16 : dtype == at::kDouble ? Dtype::kFloat64 : Dtype::kFloat32;
}

// What norms, their sums and the gradients of their weights are computed and kept in.
at::TensorOptions precision_of(const Tensor& like) {
  return like.options().dtype(like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// Of this shape and type, where `like` is; made contiguous where it is not.
Tensor read_as(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef shape,
               const at::TensorOptions& like) {
  const std::string argument(name);
  MEGARLX_CHECK(op, tensor.dtype() == like.dtype(), argument + "'s dtype", tensor.scalar_type(),
                c10::typeMetaToScalarType(like.dtype()));
  MEGARLX_CHECK(op, tensor.device() == like.device(), argument + "'s device", tensor.device(),
                like.device());
  MEGARLX_CHECK(op, tensor.sizes() == shape, argument + "'s shape", tensor.sizes(), shape);
  return tensor.contiguous();
}

Tensor read(const char* op, const char* name, const Tensor& tensor, at::IntArrayRef shape,
            const Tensor& like) {
  return read_as(op, name, tensor, shape, like.options());
}

// A matrix whose rows may stand apart.
Tensor rows_of(const Tensor& matrix) {
  return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
}

void over_rows(std::int64_t rows, std::int64_t width,
               const std::function<void(std::int64_t, std::int64_t)>& kernel) {
  if (width == 0) return;  // rows without elements may be more than can ever be walked
  at::parallel_for(0, rows, std::max<std::int64_t>(kGrain / std::max<std::int64_t>(width, 1), 1),
                   kernel);
}

// How many blocks sum the gradient of a norm's weight over so many rows.
std::int64_t blocks_on(const Tensor& like, std::int64_t rows) {
#ifdef MEGARLX_CUDA
  if (!like.is_cpu()) return cuda::norm_blocks(rows);
#endif
  return blocks_of(rows);
}

// The sums of all blocks, added in their order: [blocks, width] to [width].
Tensor summed(const Tensor& sums, std::int64_t width) {
  Tensor out = at::empty({width}, sums.options());
  const Dtype dtype = sums.scalar_type() == at::kDouble ? Dtype::kFloat64 : Dtype::kFloat32;
  const std::int64_t blocks = width == 0 ? 0 : sums.numel() / width;
#ifdef MEGARLX_CUDA
  if (!sums.is_cpu()) {
    const cuda::OnDevice device(sums.device());
    cuda::sum_blocks(dtype, sums.const_data_ptr(), blocks, width, out.mutable_data_ptr(),
                     device.stream());
    device.check("sum_blocks");
    return out;
  }
#endif
  cpu_kernels().sum_blocks(dtype, sums.const_data_ptr(), blocks, width, out.mutable_data_ptr());
  return out;
}

#ifdef MEGARLX_CUDA
template <typename Args>
void launch(const char* op, const Tensor& like, const Args& args,
            void (*launcher)(const Args&, cudaStream_t)) {
  const cuda::OnDevice device(like.device());
  launcher(args, device.stream());
  device.check(op);
}
#define MEGARLX_LAUNCH(op, like, args, name) \
  if (!like.is_cpu()) return launch(op, like, args, cuda::name)
#else
#define MEGARLX_LAUNCH(op, like, args, name)                            \
  MEGARLX_CHECK(op, like.is_cpu(), "the inputs' device", like.device(), \
                "cpu (this build has no CUDA)")
#endif

void* written(Tensor& tensor) { return tensor.mutable_data_ptr(); }
const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }

}  // namespace
}  // namespace megarlx
