// Rows rounded to e4m3, in place of weights and of what they are multiplied by.
#include "math/e4m3.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "dispatch.h"
#ifdef MEGARLX_CUDA
#include "cuda/launchers.h"
#include "cuda/stream.h"
#endif

namespace megarlx {
namespace {
using at::Tensor;

constexpr const char* kOp = "e4m3_rows_";
constexpr std::int64_t kGrain = 1 << 15;  // numbers for which another thread is worth waking
constexpr std::int64_t kMost = (std::int64_t{1} << 31) - 1;  // rows; columns are fewer still

template <typename T>
void round_rows(const E4m3Args& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.columns;
    float largest = 0.0f;
    for (std::int64_t k = 0; k < args.columns; ++k)
      largest = larger(largest, ::fabsf(static_cast<float>(x[k])));
    const float scale = args.scales[row] = e4m3_scale(largest);
    for (std::int64_t k = 0; k < args.columns; ++k)
      args.values[row * args.columns + k] = to_e4m3(static_cast<float>(x[k]) / scale);
  }
}

Dtype checked_dtype(const Tensor& x) {
  const auto type = x.scalar_type();
  const bool narrow = type == at::kBFloat16 && !x.is_cpu();
  MEGARLX_CHECK(kOp, type == at::kFloat || type == at::kDouble || narrow, "x", type,
                "Float, Double, and on CUDA BFloat16");
  return narrow ? Dtype::kBFloat16 : type == at::kDouble ? Dtype::kFloat64 : Dtype::kFloat32;
}

void check(const char* name, const Tensor& t, at::ScalarType type, at::IntArrayRef shape,
           const Tensor& like) {
  MEGARLX_CHECK(kOp, t.scalar_type() == type, name, t.scalar_type(), type);
  MEGARLX_CHECK(kOp, t.device() == like.device(), name, t.device(), like.device());
  MEGARLX_CHECK(kOp, t.sizes() == shape, name, c10::str("of shape ", t.sizes()), shape);
  MEGARLX_CHECK(kOp, t.is_contiguous(), name, c10::str("strided ", t.strides()), "contiguous");
}

void e4m3_rows_(const Tensor& x, Tensor values, Tensor scales) {
  MEGARLX_CHECK(kOp, x.dim() == 2 && x.size(0) <= kMost && x.size(1) <= kMost >> 3, "x",
                c10::str("of shape ", x.sizes()),
                c10::str("[at most ", kMost, ", at most ", kMost >> 3, "]"));
  E4m3Args args{checked_dtype(x), x.size(0), x.size(1)};
  check("x", x, x.scalar_type(), x.sizes(), x);
  check("values", values, at::kFloat8_e4m3fn, x.sizes(), x);
  check("scales", scales, at::kFloat, {x.size(0)}, x);
  args.x = x.const_data_ptr();
  args.values = static_cast<std::uint8_t*>(values.mutable_data_ptr());
  args.scales = scales.mutable_data_ptr<float>();
#ifdef MEGARLX_CUDA
  if (!x.is_cpu()) {
    const cuda::OnDevice device(x.device());
    cuda::e4m3_rows(args, device.stream());
    return device.check(kOp);
  }
#endif
  at::parallel_for(0, args.rows, std::max<std::int64_t>(1, kGrain / (args.columns + 1)),
                   [&](std::int64_t begin, std::int64_t end) {
                     args.dtype == Dtype::kFloat64 ? round_rows<double>(args, begin, end)
                                                   : round_rows<float>(args, begin, end);
                   });
}

void implement(torch::Library& m) { m.impl("e4m3_rows_", e4m3_rows_); }

TORCH_LIBRARY_IMPL(megarlx, CPU, m) { implement(m); }
#ifdef MEGARLX_CUDA
TORCH_LIBRARY_IMPL(megarlx, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace megarlx
