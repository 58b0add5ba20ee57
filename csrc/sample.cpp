// sample: tensors to kernels, for both backends. The ops:
//     sample            a token for each row, filters included
//     sample_partials   what one vocabulary shard knows of each row, 13 words of 64 bits
//     sample_combine    the partials of all shards -> a token for each row
//     philox, gumbel    the noise itself, for tests and for other uses (CPU)
#include "math/sample.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "dispatch.h"
#ifdef MEGARLX_CUDA
#include "cuda/launchers.h"
#include "cuda/stream.h"
#endif

namespace megarlx {
namespace {
using at::Tensor;
using sampling::SampleArgs;
using Drawn = std::tuple<Tensor, Tensor, Tensor>;

constexpr std::int64_t kMostIds = std::int64_t{1} << 22;  // so that no fixed-point sum overflows
constexpr std::int64_t kMostRows = INT32_MAX;

std::string shape_of(const Tensor& t) { return c10::str(t.dim(), "-d ", t.sizes()); }

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& logits,
                at::ScalarType type) {
  MEGARLX_CHECK(op, t.scalar_type() == type, name, t.scalar_type(), type);
  MEGARLX_CHECK(op, t.device() == logits.device(), name, c10::str("on ", t.device()),
                c10::str("the device of logits, ", logits.device()));
  MEGARLX_CHECK(op, t.is_contiguous(), name, "not contiguous", "a contiguous tensor");
}

// One value for all rows, or one a row; the stride to walk it with.
std::int64_t stride_of(const char* op, const char* name, const Tensor& t, std::int64_t rows) {
  const bool fits = t.dim() <= 1 && (t.numel() == 1 || t.numel() == rows);
  MEGARLX_CHECK(op, fits, name, c10::str("of shape ", t.sizes()),
                c10::str("one value, or one for each of the ", rows, " rows"));
  return t.numel() == 1 ? 0 : 1;
}

// Values can be looked at without waiting only on the CPU; on a GPU a bad one gives token -1.
template <class T>
void check_values(const char* op, const char* name, const Tensor& t, T low, T high,
                  const char* allowed) {
  if (!t.is_cpu()) return;
  const T* values = t.const_data_ptr<T>();
  for (std::int64_t i = 0; i < t.numel(); ++i)
    MEGARLX_CHECK(op, values[i] >= low && values[i] <= high, name, values[i], allowed);
}

SampleArgs arguments(const char* op, const Tensor& logits, const Tensor& seed, const Tensor& keys,
                     const Tensor& temperature, std::int64_t first_id, std::int64_t vocab_size) {
  MEGARLX_CHECK(op, logits.dim() == 2, "logits", shape_of(logits), "2-d [batch, vocabulary]");
  const auto type = logits.scalar_type();
  MEGARLX_CHECK(op, type == at::kFloat || type == at::kBFloat16, "logits", type,
                "Float or BFloat16");
  MEGARLX_CHECK(op, logits.size(1) >= 1 && logits.size(1) <= kMostIds, "the vocabulary of logits",
                logits.size(1), c10::str("1 to ", kMostIds));
  MEGARLX_CHECK(op, logits.size(0) <= kMostRows, "the batch of logits", logits.size(0),
                c10::str("at most ", kMostRows));
  MEGARLX_CHECK(op, logits.size(1) == 1 || logits.stride(1) == 1, "logits",
                c10::str("strided ", logits.strides()), "rows whose ids lie side by side");
  check_like(op, "seed", seed, logits, at::kLong);
  MEGARLX_CHECK(op, seed.numel() == 1, "seed", c10::str("of shape ", seed.sizes()), "one number");
  check_like(op, "keys", keys, logits, at::kLong);
  MEGARLX_CHECK(op, keys.dim() == 2 && keys.size(0) == logits.size(0) && keys.size(1) == 2, "keys",
                c10::str("of shape ", keys.sizes()),
                c10::str("[", logits.size(0), ", 2]: (sequence id, position) for each row"));
  check_like(op, "temperature", temperature, logits, at::kFloat);
  MEGARLX_CHECK(op, first_id >= 0 && first_id % sampling::kTile == 0, "first_id", first_id,
                "a multiple of 128, 0 or more");
  MEGARLX_CHECK(op, vocab_size >= 1 && vocab_size <= kMostIds, "vocab_size", vocab_size,
                c10::str("1 to ", kMostIds));
  check_values<float>(op, "temperature", temperature, 0.0f, std::numeric_limits<float>::max(),
                      "a finite number >= 0 (0: the most likely token)");
  SampleArgs args = {};
  args.logits = logits.const_data_ptr();
  args.dtype = type == at::kFloat ? Dtype::kFloat32 : Dtype::kBFloat16;
  args.rows = logits.size(0);
  args.columns = std::clamp<std::int64_t>(vocab_size - first_id, 0, logits.size(1));
  args.row_stride = logits.stride(0);
  args.first_id = first_id;
  args.seed = seed.const_data_ptr<std::int64_t>();
  args.keys = keys.const_data_ptr<std::int64_t>();
  args.temperature = temperature.const_data_ptr<float>();
  args.temperature_stride = stride_of(op, "temperature", temperature, args.rows);
  return args;
}

void launch(const char* op, const SampleArgs& args, const Tensor& logits) {
  if (args.rows == 0) return;
#ifdef MEGARLX_CUDA
  if (logits.is_cuda()) {
    const cuda::OnDevice device(logits.device());
    const std::int64_t bytes = cuda::sample_workspace_bytes(args);
    const Tensor workspace = at::empty({bytes}, logits.options().dtype(at::kByte));
    cuda::sample(args, workspace.mutable_data_ptr(), device.stream());
    device.check(op);
    return;
  }
#endif
  // About 16k ids are worth a thread.
  const std::int64_t grain =
      std::max<std::int64_t>(1, 16384 / std::max<std::int64_t>(1, args.columns));
  at::parallel_for(0, args.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    cpu_kernels().sample(args, begin, end);
  });
}

Drawn empty_outputs(const Tensor& like, std::int64_t rows) {
  return {at::empty({rows}, like.options().dtype(at::kLong)),
          at::empty({rows}, like.options().dtype(at::kFloat)),
          at::empty({rows}, like.options().dtype(at::kFloat))};
}

void set_outputs(SampleArgs& args, const Drawn& out) {
  args.token = std::get<0>(out).mutable_data_ptr<std::int64_t>();
  args.logprob = std::get<1>(out).mutable_data_ptr<float>();
  args.sampled_logprob = std::get<2>(out).mutable_data_ptr<float>();
}

Drawn sample(const Tensor& logits, const Tensor& seed, const Tensor& keys,
             const Tensor& temperature, const std::optional<Tensor>& top_k,
             const std::optional<Tensor>& top_p, const std::optional<Tensor>& min_p,
             std::int64_t vocab_size) {
  constexpr auto op = "sample";
  SampleArgs args = arguments(op, logits, seed, keys, temperature, 0, vocab_size);
  MEGARLX_CHECK(op, vocab_size <= logits.size(1), "vocab_size", vocab_size,
                c10::str("1 to the ", logits.size(1), " ids of logits"));
  if (top_k) {
    check_like(op, "top_k", *top_k, logits, at::kLong);
    args.top_k_stride = stride_of(op, "top_k", *top_k, args.rows);
    check_values<std::int64_t>(op, "top_k", *top_k, 0, INT64_MAX, "0 (off) or more");
    args.top_k = top_k->const_data_ptr<std::int64_t>();
  }
  if (top_p) {
    check_like(op, "top_p", *top_p, logits, at::kFloat);
    args.top_p_stride = stride_of(op, "top_p", *top_p, args.rows);
    check_values<float>(op, "top_p", *top_p, 0.0f, 1.0f, "0 to 1 (1: off)");
    args.top_p = top_p->const_data_ptr<float>();
  }
  if (min_p) {
    check_like(op, "min_p", *min_p, logits, at::kFloat);
    args.min_p_stride = stride_of(op, "min_p", *min_p, args.rows);
    check_values<float>(op, "min_p", *min_p, 0.0f, 1.0f, "0 to 1 (0: off)");
    args.min_p = min_p->const_data_ptr<float>();
  }
  Drawn out = empty_outputs(logits, args.rows);
  set_outputs(args, out);
  launch(op, args, logits);
  return out;
}

Tensor sample_partials(const Tensor& logits, const Tensor& seed, const Tensor& keys,
                       const Tensor& temperature, std::int64_t first_id, std::int64_t vocab_size) {
  constexpr auto op = "sample_partials";
  SampleArgs args = arguments(op, logits, seed, keys, temperature, first_id, vocab_size);
  Tensor partials =
      at::empty({args.rows, sampling::kPartialWords}, logits.options().dtype(at::kLong));
  args.partials = reinterpret_cast<sampling::Partial*>(partials.mutable_data_ptr<std::int64_t>());
  launch(op, args, logits);
  return partials;
}

Drawn sample_combine(const Tensor& partials, const Tensor& temperature) {
  constexpr auto op = "sample_combine";
  MEGARLX_CHECK(op, partials.dim() == 3 && partials.size(2) == sampling::kPartialWords, "partials",
                shape_of(partials), "3-d [shards, batch, 13]");
  MEGARLX_CHECK(op, partials.scalar_type() == at::kLong && partials.is_contiguous(), "partials",
                c10::str(partials.scalar_type(), " with strides ", partials.strides()),
                "contiguous Long");
  check_like(op, "temperature", temperature, partials, at::kFloat);
  const std::int64_t shards = partials.size(0), rows = partials.size(1);
  MEGARLX_CHECK(op, shards >= 1, "the number of shards in partials", shards, "1 or more");
  SampleArgs args = {};
  args.rows = rows;
  args.temperature = temperature.const_data_ptr<float>();
  args.temperature_stride = stride_of(op, "temperature", temperature, rows);
  Drawn out = empty_outputs(partials, rows);
  set_outputs(args, out);
  if (rows == 0) return out;
  const auto* partial =
      reinterpret_cast<const sampling::Partial*>(partials.const_data_ptr<std::int64_t>());
#ifdef MEGARLX_CUDA
  if (partials.is_cuda()) {
    const cuda::OnDevice device(partials.device());
    cuda::sample_combine(args, partial, shards, device.stream());
    device.check(op);
    return out;
  }
#endif
  cpu_kernels().sample_combine(args, partial, shards);
  return out;
}

// counters [N, 4] and key [2], words of 32 bits held as int64 -> [N, 4]
Tensor philox_words(const Tensor& counters, const Tensor& key) {
  MEGARLX_CHECK("philox",
                counters.scalar_type() == at::kLong && counters.dim() == 2 &&
                    counters.size(1) == 4 && counters.is_contiguous(),
                "counters", shape_of(counters), "contiguous Long [N, 4]");
  MEGARLX_CHECK("philox", key.scalar_type() == at::kLong && key.numel() == 2 && key.is_contiguous(),
                "key", shape_of(key), "contiguous Long [2]");
  Tensor out = at::empty_like(counters);
  const auto* c = counters.const_data_ptr<std::int64_t>();
  const auto* k = key.const_data_ptr<std::int64_t>();
  auto* o = out.mutable_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < counters.size(0); ++i, c += 4, o += 4) {
    const Random128 r = philox(c[0], c[1], c[2], c[3], k[0], k[1]);
    for (int j = 0; j < 4; ++j) o[j] = r.word[j];
  }
  return out;
}

// The Gumbel (natural logarithm) that 64 bits stand for.
Tensor gumbel(const Tensor& bits) {
  MEGARLX_CHECK("gumbel", bits.scalar_type() == at::kLong && bits.is_contiguous(), "bits",
                bits.scalar_type(), "contiguous Long");
  Tensor out = at::empty(bits.sizes(), bits.options().dtype(at::kDouble));
  const auto* b = bits.const_data_ptr<std::int64_t>();
  auto* o = out.mutable_data_ptr<double>();
  // In base 2, log2(1 / E) with E = -log2(u); -ln(-ln(u)) is that times ln 2, minus ln ln 2.
  const double shift = std::log(sampling::kLn2);
  for (std::int64_t i = 0; i < bits.numel(); ++i)
    o[i] = sampling::tile_gumbel(1.0f, static_cast<std::uint64_t>(b[i])) * sampling::kLn2 - shift;
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(megarlx, CPU, m) {
  m.impl("sample", sample);
  m.impl("sample_partials", sample_partials);
  m.impl("sample_combine", sample_combine);
  m.impl("philox", philox_words);
  m.impl("gumbel", gumbel);
}

#ifdef MEGARLX_CUDA
TORCH_LIBRARY_IMPL(megarlx, CUDA, m) {
  m.impl("sample", sample);
  m.impl("sample_partials", sample_partials);
  m.impl("sample_combine", sample_combine);
}
#endif

}  // namespace megarlx
