// Bindings of the token loss: checks, allocation, then the CPU kernels over threads or a CUDA
// launch. Every op fills the same TokenLossArgs.
#include "math/token_loss.h"

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <string>

#include "dispatch.h"
#include "token_loss.h"
#ifdef MEGARLX_CUDA
#include "cuda/launchers.h"
#include "cuda/stream.h"
#endif

namespace megarlx {
namespace {

LossSpec read_spec(const char* op, const SpecArguments& given) {
  LossSpec spec{};
  const c10::string_view mode = given.mode;
  if (mode == "nll") {
    spec.mode = LossMode::kNll;
  } else if (mode == "reinforce") {
    spec.mode = LossMode::kReinforce;
  } else if (mode == "ppo_clip") {
    spec.mode = LossMode::kPpoClip;
  } else {
    MEGARLX_CHECK(op, mode == "cispo", "mode", mode, "nll, reinforce, ppo_clip, cispo");
    spec.mode = LossMode::kCispo;
  }
  const c10::string_view kl = given.kl;
  if (kl == "none") {
    spec.kl = KlEstimator::kNone;
  } else if (kl == "k1") {
    spec.kl = KlEstimator::kK1;
  } else if (kl == "k2") {
    spec.kl = KlEstimator::kK2;
  } else {
    MEGARLX_CHECK(op, kl == "k3", "kl", kl, "none, k1, k2, k3");
    spec.kl = KlEstimator::kK3;
  }
  MEGARLX_CHECK(op, given.clip_low >= 0, "clip_low", given.clip_low, "a number >= 0");
  MEGARLX_CHECK(op, given.clip_high >= 0, "clip_high", given.clip_high, "a number >= 0");
  MEGARLX_CHECK(op, given.dual_clip == 0 || given.dual_clip > 1, "dual_clip", given.dual_clip,
                "0 (none) or a number > 1");
  MEGARLX_CHECK(op, std::isfinite(given.kl_coefficient), "kl_coefficient", given.kl_coefficient,
                "a finite number");
  MEGARLX_CHECK(op, std::isfinite(given.entropy_coefficient), "entropy_coefficient",
                given.entropy_coefficient, "a finite number");
  spec.clip_low = given.clip_low;
  spec.clip_high = given.clip_high;
  spec.dual_clip = given.dual_clip;
  spec.kl_coefficient = given.kl_coefficient;
  spec.entropy_coefficient = given.entropy_coefficient;
  MEGARLX_CHECK(op, given.z_loss >= 0 && std::isfinite(given.z_loss), "z_loss", given.z_loss,
                "a finite number >= 0");
  spec.z_loss = given.z_loss;
  return spec;
}

Dtype read_dtype(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      MEGARLX_CHECK(op, false, std::string(argument) + "'s dtype", tensor.scalar_type(),
                    "float32, float64, bfloat16");
  }
}

// A contiguous tensor of this dtype and shape on the device of the logits.
void check_tensor(const char* op, const char* argument, const Tensor& tensor, at::ScalarType dtype,
                  at::IntArrayRef shape, const Tensor& logits) {
  const std::string name(argument);
  MEGARLX_CHECK(op, tensor.scalar_type() == dtype, name + "'s dtype", tensor.scalar_type(), dtype);
  MEGARLX_CHECK(op, tensor.sizes() == shape, name + "'s shape", tensor.sizes(), shape);
  MEGARLX_CHECK(op, tensor.device() == logits.device(), name + "'s device", tensor.device(),
                logits.device());
  MEGARLX_CHECK(op, tensor.is_contiguous(), name + "'s strides", tensor.strides(), "contiguous");
}

const void* check_optional(const char* op, const char* argument, const OptionalTensor& tensor,
                           at::ScalarType dtype, at::IntArrayRef shape, const Tensor& logits) {
  if (!tensor.has_value()) return nullptr;
  check_tensor(op, argument, *tensor, dtype, shape, logits);
  return tensor->const_data_ptr();
}

void check_logits(const char* op, const char* argument, const Tensor& logits) {
  const std::string name(argument);
  MEGARLX_CHECK(op, logits.device().is_cpu() || logits.device().is_cuda(), name + "'s device",
                logits.device(), "cpu, cuda");
  MEGARLX_CHECK(op, logits.dim() == 2, name + "'s shape", logits.sizes(), "[tokens, vocabulary]");
  MEGARLX_CHECK(op, logits.size(1) > 0, name + "'s shape", logits.sizes(),
                "a vocabulary of at least 1");
  MEGARLX_CHECK(op, logits.size(1) == 1 || logits.stride(1) == 1, name + "'s strides",
                logits.strides(), "a last dimension with stride 1 (call .contiguous())");
}

// What every op has: logits, targets, mask, temperature, the place in the vocabulary.
TokenLossArgs read_logits(const char* op, const Tensor& logits, const Tensor& targets,
                          const OptionalTensor& mask, const Tensor& temperature,
                          int64_t vocab_start, int64_t vocab_size) {
  TokenLossArgs args{};
  check_logits(op, "logits", logits);
  args.logits_dtype = read_dtype(op, "logits", logits);
  args.tokens = logits.size(0);
  args.columns = logits.size(1);
  args.logits = logits.const_data_ptr();
  args.logits_stride = logits.stride(0);
  check_tensor(op, "targets", targets, at::kLong, {args.tokens}, logits);
  args.targets = targets.const_data_ptr<int64_t>();
  args.mask =
      static_cast<const bool*>(check_optional(op, "mask", mask, at::kBool, {args.tokens}, logits));
  check_tensor(op, "temperature", temperature, precision_of(logits), {}, logits);
  args.temperature = temperature.const_data_ptr();
  MEGARLX_CHECK(op, vocab_size > 0, "vocab_size", vocab_size, "an integer > 0");
  MEGARLX_CHECK(op, vocab_start >= 0 && vocab_start % args.columns == 0, "vocab_start", vocab_start,
                "a multiple of the columns of a shard, >= 0");
  args.vocab_start = vocab_start;
  args.vocab_size = vocab_size;
  if (logits.is_cpu()) {
    // On a GPU these would have to be waited for: there a bad value makes NaN (math/token_loss.h).
    const double degree = temperature.item<double>();
    MEGARLX_CHECK(op, degree > 0 && std::isfinite(degree), "temperature", degree, "a number > 0");
    for (int64_t i = 0; i < args.tokens; ++i) {
      const int64_t id = args.targets[i];
      MEGARLX_CHECK(op, (id >= 0 && id < vocab_size) || is_masked(args, i),
                    "targets[" + std::to_string(i) + "]", id,
                    "0 to " + std::to_string(vocab_size - 1) + ", or any id where mask is false");
    }
  }
  return args;
}

void read_tokens(const char* op, const Tensor& logits, const TokenTensors& given,
                 const SpecArguments& spec, TokenLossArgs& args) {
  args.spec = read_spec(op, spec);
  const auto dtype = precision_of(logits);
  const auto read = [&](const char* argument, const OptionalTensor& tensor) {
    return check_optional(op, argument, tensor, dtype, {args.tokens}, logits);
  };
  args.advantages = read("advantages", given.advantages);
  args.old_logprobs = read("old_logprobs", given.old_logprobs);
  args.ref_logprobs = read("ref_logprobs", given.ref_logprobs);
  args.token_weights = read("token_weights", given.token_weights);
  const bool wants_advantages = args.spec.mode != LossMode::kNll;
  MEGARLX_CHECK(op, wants_advantages == given.advantages.has_value(), "advantages",
                given.advantages.has_value() ? "given" : "missing",
                "one number a token for reinforce, ppo_clip and cispo, none for nll");
  const bool wants_reference = args.spec.kl != KlEstimator::kNone;
  MEGARLX_CHECK(op, !wants_reference || given.ref_logprobs.has_value(), "ref_logprobs", "missing",
                "one number a token when kl is k1, k2 or k3");
  check_tensor(op, "normalizer", given.normalizer, dtype, {}, logits);
  args.normalizer = given.normalizer.const_data_ptr();
}

void run(const char* op, const Tensor& logits, const TokenLossArgs& args, LossStep step) {
  if (args.tokens == 0) return;
  if (logits.is_cpu()) {
    const auto kernel = cpu_kernels().token_loss;
    const int64_t grain = std::max<int64_t>(1, 16384 / args.columns);
    at::parallel_for(0, args.tokens, grain,
                     [&](int64_t begin, int64_t end) { kernel(args, step, begin, end); });
    return;
  }
#ifdef MEGARLX_CUDA
  const cuda::OnDevice device(logits.device());
  cuda::token_loss(args, step, device.stream());
  device.check(op);
#else
  MEGARLX_CHECK(op, false, "logits's device", logits.device(), "cpu (this build has no CUDA)");
#endif
}

struct Results {
  Tensor logprobs, entropy, fields;
};

Results allocate(const Tensor& logits, TokenLossArgs& args) {
  const auto options = logits.options().dtype(precision_of(logits));
  Results results{at::empty({args.tokens}, options), at::empty({args.tokens}, options),
                  at::empty({args.tokens, kFields}, options)};
  args.logprobs = results.logprobs.mutable_data_ptr();
  args.entropy = results.entropy.mutable_data_ptr();
  args.fields = results.fields.mutable_data_ptr();
  return results;
}

// Asks for 2 MiB pages: a fresh gradient of the size of the logits otherwise costs more time in
// page faults than in arithmetic. Only a hint, so what the kernel answers does not matter.
void want_huge_pages(const Tensor& tensor) {
#ifdef __linux__
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
  const auto first = (begin + kPage - 1) / kPage * kPage,
             last = (begin + tensor.nbytes()) / kPage * kPage;
  if (tensor.is_cpu() && first < last) {
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
}

Tensor allocate_gradient(const Tensor& logits, bool with_gradient, TokenLossArgs& args) {
  if (!with_gradient) return at::empty({0}, logits.options());
  Tensor gradient = at::empty({args.tokens, args.columns}, logits.options());
  want_huge_pages(gradient);
  args.gradient = gradient.mutable_data_ptr();
  args.gradient_stride = args.columns;
  args.gradient_dtype = args.logits_dtype;
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_loss(
    const Tensor& logits, const Tensor& targets, const OptionalTensor& mask,
    const OptionalTensor& advantages, const OptionalTensor& old_logprobs,
    const OptionalTensor& ref_logprobs, const OptionalTensor& token_weights,
    const Tensor& normalizer, const Tensor& temperature, int64_t vocab_size, c10::string_view mode,
    c10::string_view kl, double clip_low, double clip_high, double dual_clip, double kl_coefficient,
    double entropy_coefficient, double z_loss, bool with_gradient) {
  const char* op = "token_loss";
  TokenLossArgs args = read_logits(op, logits, targets, mask, temperature, 0, vocab_size);
  read_tokens(
      op, logits,
      {targets, mask, advantages, old_logprobs, ref_logprobs, token_weights, normalizer,
       temperature},
      {mode, kl, clip_low, clip_high, dual_clip, kl_coefficient, entropy_coefficient, z_loss},
      args);
  MEGARLX_CHECK(op, vocab_size <= args.columns, "vocab_size", vocab_size,
                "at most the columns of logits, " + std::to_string(args.columns));
  Results results = allocate(logits, args);
  Tensor gradient = allocate_gradient(logits, with_gradient, args);
  run(op, logits, args, LossStep::kWhole);
  const auto [loss, metrics] = sum_fields(results.fields);
  return {loss, results.logprobs, results.entropy, metrics, gradient};
}

Tensor token_loss_sums(const Tensor& logits, const Tensor& targets, const OptionalTensor& mask,
                       const Tensor& temperature, int64_t vocab_start, int64_t vocab_size) {
  const char* op = "token_loss_sums";
  TokenLossArgs args = read_logits(op, logits, targets, mask, temperature, vocab_start, vocab_size);
  Tensor partials =
      at::empty({kPartials, args.tokens}, logits.options().dtype(precision_of(logits)));
  args.partials = partials.mutable_data_ptr();
  run(op, logits, args, LossStep::kSums);
  return partials;
}

// Where the gradient goes: a matrix like the logits, or the logits themselves.
void read_gradient(const char* op, const Tensor& logits, const Tensor& gradient,
                   TokenLossArgs& args) {
  check_logits(op, "gradient", gradient);
  MEGARLX_CHECK(op, gradient.sizes() == logits.sizes(), "gradient's shape", gradient.sizes(),
                logits.sizes());
  MEGARLX_CHECK(op, gradient.device() == logits.device(), "gradient's device", gradient.device(),
                logits.device());
  args.gradient_dtype = read_dtype(op, "gradient", gradient);
  const bool narrows = args.logits_dtype == Dtype::kFloat32 &&
                       args.gradient_dtype == Dtype::kBFloat16 && logits.is_cuda();
  MEGARLX_CHECK(op, args.gradient_dtype == args.logits_dtype || narrows, "gradient's dtype",
                gradient.scalar_type(),
                "the dtype of logits, or on CUDA bfloat16 beside float32 logits");
  args.gradient = gradient.mutable_data_ptr();
  args.gradient_stride = gradient.stride(0);
}

void token_loss_gradient_(const Tensor& logits, const Tensor& partials, const Tensor& targets,
                          const OptionalTensor& mask, const Tensor& by_logprob,
                          const Tensor& by_entropy, const Tensor& by_log_z,
                          const Tensor& temperature, int64_t vocab_start, int64_t vocab_size,
                          const OptionalTensor& gradient) {
  const char* op = "token_loss_gradient_";
  TokenLossArgs args = read_logits(op, logits, targets, mask, temperature, vocab_start, vocab_size);
  const auto read = [&](const char* argument, const Tensor& tensor) {
    check_tensor(op, argument, tensor, precision_of(logits), {args.tokens}, logits);
    return tensor.const_data_ptr();
  };
  check_tensor(op, "partials", partials, precision_of(logits), {kPartials, args.tokens}, logits);
  args.partials = const_cast<void*>(partials.const_data_ptr());  // only read
  args.by_logprob = read("by_logprob", by_logprob);
  args.by_entropy = read("by_entropy", by_entropy);
  args.by_log_z = read("by_log_z", by_log_z);
  read_gradient(op, logits, gradient.has_value() ? *gradient : logits, args);
  run(op, logits, args, LossStep::kGradient);
}

template <typename T>
void add_fields(const Tensor& fields, double (&sums)[kFields], double& largest_ratio) {
  const T* field = fields.const_data_ptr<T>();
  for (int64_t i = 0; i < fields.size(0); ++i, field += kFields) {
    for (int k = 0; k < kFields; ++k) sums[k] += static_cast<double>(field[k]);
    const double ratio = field[kRatio];
    if (ratio > largest_ratio || std::isnan(ratio)) largest_ratio = ratio;
  }
}

}  // namespace

// In fp64, so that the number of tokens does not limit what a sum can resolve.
std::tuple<Tensor, Tensor> sum_fields(const Tensor& fields) {
  const auto dtype = fields.scalar_type();
  if (fields.size(0) == 0) {
    return {at::zeros({}, fields.options()), at::zeros({kFields}, fields.options())};
  }
  if (fields.is_cpu()) {  // the same as below without six calls
    double sums[kFields] = {}, largest_ratio = 0;
    if (dtype == at::kFloat) {
      add_fields<float>(fields, sums, largest_ratio);
    } else {
      add_fields<double>(fields, sums, largest_ratio);
    }
    Tensor metrics = at::empty({kFields}, fields.options().dtype(at::kDouble));
    double* metric = metrics.mutable_data_ptr<double>();
    std::copy(sums + kTokens, sums + kFields, metric);
    metric[kFields - 1] = largest_ratio;
    return {at::scalar_tensor(sums[kLoss], fields.options()), metrics.to(dtype)};
  }
  const Tensor sums = fields.sum(0, /*keepdim=*/false, at::kDouble).to(dtype);
  const Tensor largest_ratio = fields.select(1, kRatio).amax(0, /*keepdim=*/true);
  return {sums.select(0, kLoss).clone(), at::cat({sums.slice(0, kTokens), largest_ratio})};
}

void token_loss_chunk(const Tensor& logits, const TokenTensors& tokens, int64_t vocab_size,
                      const SpecArguments& spec, const OptionalTensor& gradient, Tensor& logprobs,
                      Tensor& entropy, Tensor& fields) {
  const char* op = "linear_token_loss";
  TokenLossArgs args =
      read_logits(op, logits, tokens.targets, tokens.mask, tokens.temperature, 0, vocab_size);
  read_tokens(op, logits, tokens, spec, args);
  if (gradient.has_value()) read_gradient(op, logits, *gradient, args);
  const auto dtype = precision_of(logits);
  check_tensor(op, "logprobs", logprobs, dtype, {args.tokens}, logits);
  check_tensor(op, "entropy", entropy, dtype, {args.tokens}, logits);
  check_tensor(op, "fields", fields, dtype, {args.tokens, kFields}, logits);
  args.logprobs = logprobs.mutable_data_ptr();
  args.entropy = entropy.mutable_data_ptr();
  args.fields = fields.mutable_data_ptr();
  run(op, logits, args, LossStep::kWhole);
}

namespace {

void register_ops(torch::Library& m) {
  m.impl("token_loss", token_loss);
  m.impl("token_loss_sums", token_loss_sums);
  m.impl("token_loss_gradient_", token_loss_gradient_);
}

TORCH_LIBRARY_IMPL(megarlx, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(megarlx, CUDA, m) { register_ops(m); }

}  // namespace
}  // namespace megarlx
