// normal_slice_: part of the endless row of normal numbers that a key stands for (math/normal.h).
#include "math/normal.h"

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

constexpr std::int64_t kMost = std::int64_t{1} << 62;  // so that no index overflows

normal::Args arguments(const Tensor& out, std::int64_t key, std::int64_t first, std::int64_t step,
                       double std) {
  const char* op = "normal_slice_";
  const auto type = out.scalar_type();
  MEGARLX_CHECK(op, type == at::kFloat || type == at::kDouble || type == at::kBFloat16, "out", type,
                "Float, Double, BFloat16");
  MEGARLX_CHECK(op, out.dim() == 2, "out", c10::str("of shape ", out.sizes()), "[rows, columns]");
  MEGARLX_CHECK(op, out.size(1) <= 1 || out.stride(1) == 1, "out",
                c10::str("strided ", out.strides()), "rows whose numbers lie side by side");
  normal::Args args = {};
  args.out = out.mutable_data_ptr();
  args.dtype = type == at::kFloat    ? Dtype::kFloat32
               : type == at::kDouble ? Dtype::kFloat64
                                     : Dtype::kBFloat16;
  args.rows = out.size(0), args.columns = out.size(1), args.row_stride = out.stride(0);
  MEGARLX_CHECK(op, first >= 0 && first <= kMost - args.columns, "first", first,
                c10::str("0 to 2^62, less the ", args.columns, " columns"));
  const std::int64_t further = std::max<std::int64_t>(1, args.rows - 1);
  MEGARLX_CHECK(op, step >= 0 && step <= (kMost - args.columns - first) / further, "step", step,
                "0 or more, and no index beyond 2^62");
  MEGARLX_CHECK(op, std >= 0 && std <= std::numeric_limits<float>::max(), "std", std,
                "a finite number >= 0");
  args.first = first, args.step = step;
  args.key = static_cast<std::uint64_t>(key);
  args.std = static_cast<float>(std);
  if (step == args.columns && args.row_stride == args.columns) {  // one long row
    args.columns *= args.rows;
    args.rows = std::min<std::int64_t>(args.rows, 1);
  }
  args.groups = normal::most_groups(args.columns);
  return args;
}

void normal_slice_(Tensor out, std::int64_t key, std::int64_t first, std::int64_t step,
                   double std) {
  const normal::Args args = arguments(out, key, first, step, std);
  if (out.numel() == 0) return;
#ifdef MEGARLX_CUDA
  if (out.is_cuda()) {
    const cuda::OnDevice device(out.device());
    cuda::normal_slice(args, device.stream());
    return device.check("normal_slice_");
  }
#endif
  constexpr std::int64_t kGrain = 256;  // groups for which another thread is worth waking
  at::parallel_for(0, args.rows * args.groups, kGrain, [&](std::int64_t begin, std::int64_t end) {
    cpu_kernels().normal_slice(args, begin, end);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(megarlx, CPU, m) { m.impl("normal_slice_", normal_slice_); }
#ifdef MEGARLX_CUDA
TORCH_LIBRARY_IMPL(megarlx, CUDA, m) { m.impl("normal_slice_", normal_slice_); }
#endif

}  // namespace megarlx
