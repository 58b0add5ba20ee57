// average_adamw_, adamw_update_ and replica_average_*: tensors in, checks, then the kernels of the
// CPU or of CUDA.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "dispatch.h"

#ifdef MEGARLX_CUDA
#include "cuda/launchers.h"
#include "cuda/stream.h"
#endif

namespace megarlx {
namespace {

constexpr std::int64_t kGrain = 1 << 15;  // elements for which another thread is worth waking

struct Named {
  std::string name;
  at::Tensor tensor;
  bool written;
};

Dtype dtype_of(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kDouble) return Dtype::kFloat64;
  return tensor.scalar_type() == at::kFloat ? Dtype::kFloat32 : Dtype::kBFloat16;
}

std::string numbered(const char* name, std::size_t i) {
  return std::string(name) + "[" + std::to_string(i) + "]";
}

// A buffer of `shape`, contiguous, on `device`, of dtype `exact` or (where allowed) bfloat16.
void check_buffer(const char* op, const std::string& name, const at::Tensor& tensor,
                  const at::Tensor& like, bool or_bfloat16) {
  const auto exact = like.scalar_type();
  const bool fits =
      tensor.scalar_type() == exact || (or_bfloat16 && tensor.scalar_type() == at::kBFloat16);
  MEGARLX_CHECK(op, fits, name + ".dtype", tensor.scalar_type(),
                c10::str(exact, or_bfloat16 ? " or BFloat16" : ""));
  MEGARLX_CHECK(op, tensor.device() == like.device(), name + ".device", tensor.device(),
                like.device());
  MEGARLX_CHECK(op, tensor.sizes() == like.sizes(), name + ".shape", tensor.sizes(), like.sizes());
  MEGARLX_CHECK(op, tensor.is_contiguous(), name + ".stride", tensor.strides(), "contiguous");
}

// The buffer that the others are compared with.
void check_first(const char* op, const char* name, const at::Tensor& tensor) {
  const bool fits = tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
  MEGARLX_CHECK(op, fits, std::string(name) + ".dtype", tensor.scalar_type(), "Float or Double");
  MEGARLX_CHECK(op, tensor.is_contiguous(), std::string(name) + ".stride", tensor.strides(),
                "contiguous");
}

// One number (or flag) an objective.
void check_numbers(const char* op, const char* name, const at::Tensor& tensor, std::int64_t n,
                   at::ScalarType dtype, at::Device device) {
  MEGARLX_CHECK(op, tensor.scalar_type() == dtype, std::string(name) + ".dtype",
                tensor.scalar_type(), dtype);
  MEGARLX_CHECK(op, tensor.dim() == 1 && tensor.size(0) == n, std::string(name) + ".shape",
                tensor.sizes(), c10::str("[", n, "], one an objective"));
  MEGARLX_CHECK(op, tensor.is_contiguous(), std::string(name) + ".stride", tensor.strides(),
                "contiguous");
  MEGARLX_CHECK(op, tensor.device() == device, std::string(name) + ".device", tensor.device(),
                device);
}

// Elements are updated in place, in any order: what is written may share memory with nothing.
void check_apart(const char* op, const std::vector<Named>& buffers) {
  auto begin = [](const Named& b) { return static_cast<const char*>(b.tensor.const_data_ptr()); };
  for (std::size_t i = 0; i < buffers.size(); ++i)
    for (std::size_t j = 0; j < i; ++j) {
      const Named &a = buffers[i], &b = buffers[j];
      if (!a.written && !b.written) continue;
      const bool apart = a.tensor.nbytes() == 0 || b.tensor.nbytes() == 0 ||
                         begin(a) + a.tensor.nbytes() <= begin(b) ||
                         begin(b) + b.tensor.nbytes() <= begin(a);
      MEGARLX_CHECK(op, apart, a.name, "in the same memory as " + b.name,
                    "buffers that do not overlap");
    }
}

// What autograd saved of these buffers is no longer true.
void changed(const std::vector<Named>& buffers) {
  for (const Named& buffer : buffers)
    if (buffer.written && !buffer.tensor.is_inference())
      buffer.tensor.unsafeGetTensorImpl()->bump_version();
}

void run_adamw(const char* op, const AdamWArgs& args, const at::Tensor& master) {
#ifdef MEGARLX_CUDA
  if (master.is_cuda()) {
    const cuda::OnDevice on(master.device());
    const auto bytes = static_cast<std::int64_t>(sizeof(AdamWCoefficients<double>));
    const at::Tensor coefficients =
        at::empty({bytes * args.objectives}, master.options().dtype(at::kByte));
    cuda::average_adamw(args, coefficients.mutable_data_ptr(), on.stream());
    on.check(op);
    return;
  }
#endif
  AdamWCoefficients<double> coefficients[kMaxObjectives];
  for (int i = 0; i < args.objectives; ++i) coefficients[i] = adamw_coefficients(args, i);
  at::parallel_for(0, args.count, kGrain, [&](std::int64_t begin, std::int64_t end) {
    cpu_kernels().average_adamw(args, coefficients, begin, end);
  });
}

void adamw(const char* op, const at::Tensor& master, at::TensorList grads, at::TensorList exp_avgs,
           at::TensorList exp_avg_sqs, const at::Tensor& lrs, at::ArrayRef<double> beta1s,
           at::ArrayRef<double> beta2s, at::ArrayRef<double> eps, const at::Tensor& weight_decays,
           const at::Tensor& steps, const at::Tensor& clips,
           const std::optional<at::Tensor>& weights, const std::optional<at::Tensor>& found_inf,
           const std::optional<at::Tensor>& out, bool only_delta) {
  const std::size_t n = grads.size();
  MEGARLX_CHECK(op, n >= 1 && n <= kMaxObjectives, "the number of grads", n,
                c10::str("1 to ", kMaxObjectives));
  auto check_length = [&](const char* name, std::size_t length) {
    MEGARLX_CHECK(op, length == n, std::string("the number of ") + name, length,
                  c10::str(n, ", as many as grads"));
  };
  check_length("exp_avgs", exp_avgs.size());
  check_length("exp_avg_sqs", exp_avg_sqs.size());
  check_length("beta1s", beta1s.size());
  check_length("beta2s", beta2s.size());
  check_length("eps", eps.size());

  check_first(op, "master", master);
  std::vector<Named> buffers{{"master", master, !only_delta}};
  for (std::size_t i = 0; i < n; ++i) {
    check_buffer(op, numbered("grads", i), grads[i], master, true);
    MEGARLX_CHECK(op, grads[i].scalar_type() == grads[0].scalar_type(),
                  numbered("grads", i) + ".dtype", grads[i].scalar_type(),
                  c10::str(grads[0].scalar_type(), ", as grads[0]"));
    check_buffer(op, numbered("exp_avgs", i), exp_avgs[i], master, false);
    check_buffer(op, numbered("exp_avg_sqs", i), exp_avg_sqs[i], master, false);
    buffers.push_back({numbered("grads", i), grads[i], false});
    buffers.push_back({numbered("exp_avgs", i), exp_avgs[i], true});
    buffers.push_back({numbered("exp_avg_sqs", i), exp_avg_sqs[i], true});
  }
  const char* out_name = only_delta ? "delta" : "param_out";
  if (out.has_value()) {
    check_buffer(op, out_name, *out, master, true);
    buffers.push_back({out_name, *out, true});
  }
  const auto count = static_cast<std::int64_t>(n);
  for (const auto& [name, numbers] :
       {std::pair{"lrs", lrs}, {"weight_decays", weight_decays}, {"clips", clips}})
    check_numbers(op, name, numbers, count, at::kDouble, master.device());
  if (weights.has_value())
    check_numbers(op, "weights", *weights, count, at::kDouble, master.device());
  check_numbers(op, "steps", steps, count, at::kLong, master.device());
  if (found_inf.has_value())
    check_numbers(op, "found_inf", *found_inf, count, at::kBool, master.device());
  buffers.push_back({"steps", steps, true});
  for (std::size_t i = 0; i < n; ++i) {
    for (const auto& [name, beta] : {std::pair{"beta1s", beta1s[i]}, {"beta2s", beta2s[i]}})
      MEGARLX_CHECK(op, beta >= 0 && beta < 1, numbered(name, i), beta, "0 <= beta < 1");
    MEGARLX_CHECK(op, eps[i] > 0 && std::isfinite(eps[i]), numbered("eps", i), eps[i],
                  "a positive number");
  }
  check_apart(op, buffers);

  AdamWArgs args{};
  args.count = master.numel();
  args.objectives = static_cast<int>(n);
  args.dtype = dtype_of(master);
  args.grad_dtype = dtype_of(grads[0]);
  args.out_dtype = out.has_value() ? dtype_of(*out) : args.dtype;
  args.master = master.data_ptr();
  for (std::size_t i = 0; i < n; ++i) {
    args.grads[i] = grads[i].const_data_ptr();
    args.exp_avgs[i] = exp_avgs[i].data_ptr();
    args.exp_avg_sqs[i] = exp_avg_sqs[i].data_ptr();
    args.beta1[i] = beta1s[i];
    args.beta2[i] = beta2s[i];
    args.eps[i] = eps[i];
  }
  args.out = out.has_value() ? out->data_ptr() : nullptr;
  args.only_delta = only_delta;
  args.lrs = lrs.const_data_ptr<double>();
  args.weight_decays = weight_decays.const_data_ptr<double>();
  args.clips = clips.const_data_ptr<double>();
  args.weights = weights.has_value() ? weights->const_data_ptr<double>() : nullptr;
  args.steps = steps.data_ptr<std::int64_t>();
  args.found_inf = found_inf.has_value() ? found_inf->const_data_ptr<bool>() : nullptr;
  run_adamw(op, args, master);
  changed(buffers);
}

void average_adamw_(const at::Tensor& master, at::TensorList grads, at::TensorList exp_avgs,
                    at::TensorList exp_avg_sqs, const at::Tensor& lrs, at::ArrayRef<double> beta1s,
                    at::ArrayRef<double> beta2s, at::ArrayRef<double> eps,
                    const at::Tensor& weight_decays, const at::Tensor& steps,
                    const at::Tensor& clips, const at::Tensor& weights,
                    const std::optional<at::Tensor>& found_inf,
                    const std::optional<at::Tensor>& param_out) {
  adamw("average_adamw_", master, grads, exp_avgs, exp_avg_sqs, lrs, beta1s, beta2s, eps,
        weight_decays, steps, clips, weights, found_inf, param_out, false);
}

void adamw_update_(const at::Tensor& master, const at::Tensor& grad, const at::Tensor& exp_avg,
                   const at::Tensor& exp_avg_sq, const at::Tensor& lr, double beta1, double beta2,
                   double eps, const at::Tensor& weight_decay, const at::Tensor& steps,
                   const at::Tensor& clip, const std::optional<at::Tensor>& found_inf,
                   const at::Tensor& delta) {
  adamw("adamw_update_", master, {grad}, {exp_avg}, {exp_avg_sq}, lr, {beta1}, {beta2}, {eps},
        weight_decay, steps, clip, std::nullopt, found_inf, delta, true);
}

std::tuple<at::Tensor, at::Tensor> replica_average_pack(const at::Tensor& input,
                                                        const at::Tensor& weight,
                                                        const std::optional<at::Tensor>& found_inf,
                                                        const at::Tensor& packed) {
  const char* op = "replica_average_pack";
  check_first(op, "input", input);
  check_buffer(op, "packed", packed, input, true);
  const std::vector<Named> buffers{{"input", input, false}, {"packed", packed, true}};
  check_apart(op, buffers);
  check_numbers(op, "weight", weight, 1, at::kDouble, input.device());
  if (found_inf.has_value())
    check_numbers(op, "found_inf", *found_inf, 1, at::kBool, input.device());

  const std::int64_t chunks = pack_chunks(input.numel());
  at::Tensor partial_norms = at::empty({chunks}, input.options().dtype(at::kDouble));
  at::Tensor squared_norm = at::empty({1}, input.options().dtype(at::kDouble));
  at::Tensor packed_found_inf = at::empty({1}, input.options().dtype(at::kBool));
  PackArgs args{input.numel(),
                dtype_of(input),
                dtype_of(packed),
                input.const_data_ptr(),
                packed.data_ptr(),
                weight.const_data_ptr<double>(),
                found_inf.has_value() ? found_inf->const_data_ptr<bool>() : nullptr,
                partial_norms.data_ptr<double>(),
                squared_norm.data_ptr<double>(),
                packed_found_inf.data_ptr<bool>()};
#ifdef MEGARLX_CUDA
  if (input.is_cuda()) {
    const cuda::OnDevice on(input.device());
    cuda::replica_average_pack(args, on.stream());
    on.check(op);
    changed(buffers);
    return {squared_norm, packed_found_inf};
  }
#endif
  at::parallel_for(0, chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    cpu_kernels().replica_average_pack(args, begin, end);
  });
  double sum = 0;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) sum += args.partial_norms[chunk];
  *args.squared_norm = sum;
  *args.packed_found_inf = !std::isfinite(sum) || (args.found_inf != nullptr && *args.found_inf);
  changed(buffers);
  return {squared_norm, packed_found_inf};
}

void replica_average_skip_(const at::Tensor& packed, const at::Tensor& found_inf) {
  const char* op = "replica_average_skip_";
  check_numbers(op, "found_inf", found_inf, 1, at::kBool, packed.device());
  MEGARLX_CHECK(op, packed.is_contiguous(), "packed.stride", packed.strides(), "contiguous");
#ifdef MEGARLX_CUDA
  if (packed.is_cuda()) {
    const cuda::OnDevice on(packed.device());
    cuda::zero_if(packed.data_ptr(), static_cast<std::int64_t>(packed.nbytes()),
                  found_inf.const_data_ptr<bool>(), on.stream());
    on.check(op);
  }
#endif
  if (packed.is_cpu() && *found_inf.const_data_ptr<bool>())
    std::memset(packed.data_ptr(), 0, packed.nbytes());
  changed({{"packed", packed, true}});
}

void replica_average_apply_(const at::Tensor& target, const at::Tensor& summed, bool add,
                            const std::optional<at::Tensor>& param_out) {
  const char* op = "replica_average_apply_";
  check_first(op, "target", target);
  check_buffer(op, "summed", summed, target, true);
  std::vector<Named> buffers{{"target", target, true}, {"summed", summed, false}};
  if (param_out.has_value()) {
    check_buffer(op, "param_out", *param_out, target, true);
    buffers.push_back({"param_out", *param_out, true});
  }
  check_apart(op, buffers);
  const ApplyArgs args{target.numel(),
                       dtype_of(target),
                       dtype_of(summed),
                       param_out.has_value() ? dtype_of(*param_out) : dtype_of(target),
                       add,
                       target.data_ptr(),
                       summed.const_data_ptr(),
                       param_out.has_value() ? param_out->data_ptr() : nullptr};
#ifdef MEGARLX_CUDA
  if (target.is_cuda()) {
    const cuda::OnDevice on(target.device());
    cuda::replica_average_apply(args, on.stream());
    on.check(op);
    changed(buffers);
    return;
  }
#endif
  at::parallel_for(0, args.count, kGrain, [&](std::int64_t begin, std::int64_t end) {
    cpu_kernels().replica_average_apply(args, begin, end);
  });
  changed(buffers);
}

void implement(torch::Library& m) {
  m.impl("average_adamw_", &average_adamw_);
  m.impl("adamw_update_", &adamw_update_);
  m.impl("replica_average_pack", &replica_average_pack);
  m.impl("replica_average_skip_", &replica_average_skip_);
  m.impl("replica_average_apply_", &replica_average_apply_);
}

}  // namespace

TORCH_LIBRARY_IMPL(megarlx, CPU, m) { implement(m); }
#ifdef MEGARLX_CUDA
TORCH_LIBRARY_IMPL(megarlx, CUDA, m) { implement(m); }
#endif

}  // namespace megarlx
