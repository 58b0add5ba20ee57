// The token loss from hidden states, for CPU and CUDA: a chunk of rows at a time, three products.
// (The loop over vocabulary shards, with collectives between its steps, is in Python. This one is
// not, because at a hidden size of 64 the Python calls took a fifth of the whole.)
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "beside.h"
#include "dispatch.h"
#include "math/token_loss.h"
#include "product.h"
#include "token_loss.h"

namespace megarlx {
namespace {

constexpr const char* kOp = "linear_token_loss";

template <typename Change>
TokenTensors each(const TokenTensors& tokens, const Change& change) {
  const auto optional = [&](const OptionalTensor& tensor) {
    return tensor.has_value() ? OptionalTensor(change(*tensor)) : std::nullopt;
  };
  return {change(tokens.targets),
          optional(tokens.mask),
          optional(tokens.advantages),
          optional(tokens.old_logprobs),
          optional(tokens.ref_logprobs),
          optional(tokens.token_weights),
          tokens.normalizer,
          tokens.temperature};
}

struct Outputs {
  Tensor loss, logprobs, entropy, metrics, grad_hidden;
};

// bf16 products with an fp32 result, which only CUDA has; elsewhere the inputs are widened first.
bool has_mixed_products(const Tensor& hidden) {
  return hidden.is_cuda() && hidden.scalar_type() == at::kBFloat16;
}

void check(const Tensor& hidden, const Tensor& weight, const TokenTensors& tokens,
           int64_t vocab_size, int64_t rows_per_chunk, int64_t kept_mib) {
  MEGARLX_CHECK(kOp, hidden.dim() == 2, "hidden's shape", hidden.sizes(), "[tokens, hidden]");
  MEGARLX_CHECK(kOp, weight.dim() == 2 && weight.size(1) == hidden.size(1) && weight.size(0) > 0,
                "weight's shape", weight.sizes(), "[vocabulary, hidden]");
  const auto dtype = hidden.scalar_type();
  MEGARLX_CHECK(kOp, dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16,
                "hidden's dtype", dtype, "float32, float64, bfloat16");
  MEGARLX_CHECK(kOp, weight.scalar_type() == dtype, "weight's dtype", weight.scalar_type(), dtype);
  MEGARLX_CHECK(kOp, weight.device() == hidden.device(), "weight's device", weight.device(),
                hidden.device());
  MEGARLX_CHECK(kOp, rows_per_chunk > 0, "rows_per_chunk", rows_per_chunk, "an integer > 0");
  MEGARLX_CHECK(kOp, kept_mib >= 0, "kept_gradients_mib", kept_mib, "an integer >= 0");
  MEGARLX_CHECK(kOp, vocab_size <= weight.size(0), "vocab_size", vocab_size,
                "at most the rows of weight, " + std::to_string(weight.size(0)));
  // The others are checked chunk by chunk; these are sliced first.
  const auto check_rows = [&](const char* name, const OptionalTensor& tensor) {
    MEGARLX_CHECK(kOp, !tensor.has_value() || tensor->sizes() == at::IntArrayRef{hidden.size(0)},
                  std::string(name) + "'s shape", tensor->sizes(), hidden.size(0));
  };
  check_rows("targets", tokens.targets);
  check_rows("mask", tokens.mask);
  check_rows("advantages", tokens.advantages);
  check_rows("old_logprobs", tokens.old_logprobs);
  check_rows("ref_logprobs", tokens.ref_logprobs);
  check_rows("token_weights", tokens.token_weights);
}

// total [V, d] (+)= gradient [rows, V].T @ hidden [rows, d]
void add_product(Tensor& total, const Tensor& gradient, const Tensor& hidden, bool replace) {
  if (gradient.scalar_type() == total.scalar_type()) {
    product_(total, gradient.t(), hidden, /*add=*/!replace);
  } else if (replace) {
    at::mm_out(total, gradient.t(), hidden, total.scalar_type());
  } else {
    at::addmm_out(total, total, gradient.t(), hidden, total.scalar_type(), /*beta=*/1,
                  /*alpha=*/1);
  }
}

// Rows of a call, in as many as one chunk has or, with as many as all have, in their own.
Tensor place(const Tensor& rows, int64_t begin, int64_t n) {
  return rows.narrow(0, begin % rows.size(0), n);
}

// The walk over chunks: logits, the loss that makes their gradient, both products of that. Where
// gradients lie apart from their logits, in bf16 on CUDA, a chunk has two parts, and the loss of a
// part runs beside the next one's logits. Where all gradients by logits may be kept, the weight's
// is one product at the end.
// grad_weight: undefined for no gradients at all, else [V, d] in fp32 (fp64): replaced or added to.
class Chunks {
 public:
  Chunks(const Tensor& hidden, const Tensor& weight, const TokenTensors& tokens, int64_t vocab_size,
         const SpecArguments& spec, int64_t rows_per_chunk, int64_t kept_mib, Tensor grad_weight,
         bool replace)
      : hidden_(hidden),
        weight_(weight),
        grad_weight_(std::move(grad_weight)),
        tokens_(tokens),
        vocab_size_(vocab_size),
        spec_(spec),
        count_(hidden.size(0)),
        rows_(std::min(rows_per_chunk, std::max<int64_t>(count_, 1))),
        precision_(precision_of(hidden)),
        mixed_(has_mixed_products(hidden)),
        widened_(hidden.scalar_type() != precision_ && !mixed_),
        replace_(replace) {
    if (widened_) weight_ = weight_.to(precision_);
    transposed_ = weight_.t();
    const auto wide = hidden.options().dtype(precision_);
    logprobs = at::empty({count_}, wide);
    entropy = at::empty({count_}, wide);
    fields = at::empty({count_, kFields}, wide);
    grad_hidden = with_gradient() ? at::empty(hidden.sizes(), hidden.options())
                                  : at::empty({0}, hidden.options());
    part_rows_ = is_beside() ? (rows_ + 1) / 2 : rows_;
    keeps_ = with_gradient() && count_ > rows_ && fits(kept_mib);
    logits_ = allocate(keeps_ && !mixed_, wide);
    gradients_ = mixed_ && with_gradient() ? allocate(keeps_, hidden.options()) : logits_;
    if (keeps_) inputs_ = readable(hidden_, tokens_.mask);
  }

  void run() {
    std::optional<Beside> beside;  // asks for the type: an emulated card has no streams
    if (is_beside() && hidden_.device().type() == at::kCUDA) beside.emplace(hidden_.device());
    try {
      walk(beside);
    } catch (...) {  // what frees the tensors here would give them to the first stream
      if (beside.has_value()) beside->join_all();
      throw;
    }
    if (keeps_) add_product(grad_weight_, gradients_, inputs_, replace_);
    if (with_gradient() && replace_ && count_ == 0) grad_weight_.zero_();
  }

  Tensor logprobs, entropy, fields, grad_hidden;

 private:
  bool with_gradient() const { return grad_weight_.defined(); }
  bool is_beside() const { return mixed_ && count_ > rows_ && rows_ > 1; }

  bool fits(int64_t kept_mib) const {
    const int64_t bytes = count_ * weight_.size(0) * (mixed_ ? 2 : at::elementSize(precision_));
    return bytes / (1 << 20) + (bytes % (1 << 20) > 0) <= kept_mib;
  }

  Tensor allocate(bool for_all, const at::TensorOptions& options) const {
    return at::empty({for_all ? count_ : rows_, weight_.size(0)}, options);
  }

  // Masked rows are 0: their gradient is 0, and 0 times NaN would be NaN in the weight's.
  Tensor readable(Tensor hidden, const OptionalTensor& mask) const {
    if (mask.has_value()) hidden = hidden.masked_fill(mask->logical_not().unsqueeze(1), 0);
    return mixed_ ? hidden : hidden.to(precision_);
  }

  void walk(std::optional<Beside>& beside) {
    int64_t number = 0;  // of the part
    for (int64_t chunk = 0; chunk < count_; chunk += rows_) {
      const int64_t end = std::min(chunk + rows_, count_);
      const Tensor before = std::exchange(input_, input_of(chunk, end - chunk));
      for (int64_t part = chunk; part < end; part += part_rows_, ++number) {
        const int64_t n = std::min(part_rows_, end - part);
        if (beside.has_value() && number > 1) beside->join(number - 2);  // it was in this place
        make_logits(part, n, input_.narrow(0, part - chunk, n));
        if (is_beside() && part == chunk && chunk > 0) {
          if (beside.has_value()) beside->join(number - 1);
          go_back(chunk - rows_, rows_, before);
        }
        if (beside.has_value()) {
          beside->begin(number, [&] { take_loss(part, n); });
        } else {
          take_loss(part, n);
        }
      }
      if (!is_beside()) go_back(chunk, end - chunk, input_);
    }
    if (beside.has_value()) beside->join_all();
    const int64_t last = (count_ - 1) / rows_ * rows_;
    if (is_beside()) go_back(last, count_ - last, input_);
  }

  Tensor input_of(int64_t chunk, int64_t n) const {
    if (keeps_) return inputs_.narrow(0, chunk, n);
    OptionalTensor mask;
    if (tokens_.mask.has_value()) mask = tokens_.mask->narrow(0, chunk, n);
    return readable(hidden_.narrow(0, chunk, n), mask);
  }

  void make_logits(int64_t part, int64_t n, const Tensor& input) {
    Tensor logits = place(logits_, part, n);
    if (mixed_) {
      at::mm_out(logits, input, transposed_, precision_);
    } else {
      product_(logits, input, transposed_);
    }
  }

  void take_loss(int64_t part, int64_t n) {
    const auto of = [&](const Tensor& tensor) { return tensor.narrow(0, part, n); };
    Tensor of_logprobs = of(logprobs), of_entropy = of(entropy), of_fields = of(fields);
    OptionalTensor gradient;
    if (with_gradient()) gradient = place(gradients_, part, n);
    token_loss_chunk(place(logits_, part, n), each(tokens_, of), vocab_size_, spec_, gradient,
                     of_logprobs, of_entropy, of_fields);
  }

  void go_back(int64_t chunk, int64_t n, const Tensor& input) {
    if (!with_gradient()) return;
    const Tensor gradient = place(gradients_, chunk, n);
    Tensor out = grad_hidden.narrow(0, chunk, n);
    if (widened_) {
      out.copy_(at::mm(gradient, weight_));
    } else {
      product_(out, gradient, weight_);
    }
    if (!keeps_) add_product(grad_weight_, gradient, input, replace_ && chunk == 0);
  }

  Tensor hidden_, weight_, transposed_, grad_weight_;
  TokenTensors tokens_;
  int64_t vocab_size_;
  SpecArguments spec_;
  int64_t count_, rows_, part_rows_ = 0;
  at::ScalarType precision_;
  bool mixed_, widened_, replace_, keeps_ = false;
  Tensor logits_, gradients_;
  Tensor inputs_, input_;  // hidden rows as products read them: all that are kept, a chunk's
};

Outputs run_chunks(Tensor hidden, const Tensor& weight, TokenTensors tokens, int64_t vocab_size,
                   const SpecArguments& spec, int64_t rows_per_chunk, int64_t kept_mib,
                   bool drop_masked, const Tensor& grad_weight, bool replace) {
  check(hidden, weight, tokens, vocab_size, rows_per_chunk, kept_mib);
  const int64_t total = hidden.size(0);
  Tensor kept;
  if (tokens.mask.has_value() && drop_masked) {
    kept = tokens.mask->nonzero().squeeze(1);
    if (kept.size(0) == total) {
      kept = Tensor();
    } else {
      hidden = hidden.index_select(0, kept);
      tokens = each(tokens, [&](const Tensor& tensor) { return tensor.index_select(0, kept); });
    }
    tokens.mask = std::nullopt;
  }
  Chunks chunks(hidden, weight, tokens, vocab_size, spec, rows_per_chunk, kept_mib, grad_weight,
                replace);
  chunks.run();
  const auto [loss, metrics] = sum_fields(chunks.fields);
  const auto spread = [&](const Tensor& rows) {
    if (!kept.defined()) return rows;
    auto sizes = rows.sizes().vec();
    sizes[0] = total;
    return at::zeros(sizes, rows.options()).index_copy_(0, kept, rows);
  };
  return {loss, spread(chunks.logprobs), spread(chunks.entropy), metrics,
          grad_weight.defined() ? spread(chunks.grad_hidden) : chunks.grad_hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_token_loss(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& mask,
    const OptionalTensor& advantages, const OptionalTensor& old_logprobs,
    const OptionalTensor& ref_logprobs, const OptionalTensor& token_weights,
    const Tensor& normalizer, const Tensor& temperature, int64_t vocab_size, c10::string_view mode,
    c10::string_view kl, double clip_low, double clip_high, double dual_clip, double kl_coefficient,
    double entropy_coefficient, double z_loss, int64_t rows_per_chunk, int64_t kept_gradients_mib,
    bool drop_masked, bool with_gradient) {
  Tensor grad_weight;
  if (with_gradient) {
    grad_weight = at::empty(weight.sizes(), weight.options().dtype(precision_of(weight)));
  }
  const Outputs out = run_chunks(
      hidden, weight,
      {targets, mask, advantages, old_logprobs, ref_logprobs, token_weights, normalizer,
       temperature},
      vocab_size,
      {mode, kl, clip_low, clip_high, dual_clip, kl_coefficient, entropy_coefficient, z_loss},
      rows_per_chunk, kept_gradients_mib, drop_masked, grad_weight, /*replace=*/true);
  grad_weight =
      with_gradient ? grad_weight.to(weight.scalar_type()) : at::empty({0}, weight.options());
  return {out.loss, out.logprobs, out.entropy, out.metrics, out.grad_hidden, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_token_loss_(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& mask,
    const OptionalTensor& advantages, const OptionalTensor& old_logprobs,
    const OptionalTensor& ref_logprobs, const OptionalTensor& token_weights,
    const Tensor& normalizer, const Tensor& temperature, int64_t vocab_size, c10::string_view mode,
    c10::string_view kl, double clip_low, double clip_high, double dual_clip, double kl_coefficient,
    double entropy_coefficient, double z_loss, int64_t rows_per_chunk, int64_t kept_gradients_mib,
    bool drop_masked, Tensor& grad_weight) {
  const Outputs out = run_chunks(
      hidden, weight,
      {targets, mask, advantages, old_logprobs, ref_logprobs, token_weights, normalizer,
       temperature},
      vocab_size,
      {mode, kl, clip_low, clip_high, dual_clip, kl_coefficient, entropy_coefficient, z_loss},
      rows_per_chunk, kept_gradients_mib, drop_masked, grad_weight, /*replace=*/false);
  return {out.loss, out.logprobs, out.entropy, out.metrics, out.grad_hidden};
}

void register_ops(torch::Library& m) {
  m.impl("linear_token_loss", linear_token_loss);
  m.impl("_linear_token_loss_", linear_token_loss_);
}

TORCH_LIBRARY_IMPL(megarlx, CPU, m) { register_ops(m); }
TORCH_LIBRARY_IMPL(megarlx, CUDA, m) { register_ops(m); }

}  // namespace
}  // namespace megarlx
