// Products of matrices: our own in fp32 on some CPUs, else torch's.
#include "product.h"

#include <ATen/Context.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <string_view>

#include "dispatch.h"
#include "math/product.h"

namespace megarlx {
namespace {
using at::Tensor;

constexpr std::int64_t kFewRows = 32;               // below: columns of out are made as rows
constexpr double kFlopsPerThread = 2e6;             // for which a thread is worth waking
constexpr std::int64_t kPackedA = 4, kPackedB = 8;  // cost of packing, in columns (rows) of c

void check_matrix(const char* op, const char* name, const Tensor& t) {
  MEGARLX_CHECK(op, t.dim() == 2, std::string(name) + "'s shape", t.sizes(), "a matrix");
  MEGARLX_CHECK(op, t.scalar_type() == at::kFloat, std::string(name) + "'s dtype", t.scalar_type(),
                "float32");
}

// One of the strides is 1; copied where none is.
Tensor by_rows_or_columns(const Tensor& t) {
  return t.stride(0) == 1 || t.stride(1) == 1 ? t : t.contiguous();
}

// A side of length 1 may have any stride.
Strided<const float> strided(const Tensor& t) {
  const bool by_rows = t.stride(1) == 1 || t.size(1) == 1;
  return {t.const_data_ptr<float>(),
          by_rows && t.size(0) > 1 ? t.stride(0)
          : by_rows                ? t.size(1)
                                   : 1,
          by_rows ? 1 : t.stride(1)};
}

struct Grid {
  std::int64_t rows, columns;
};

// Threads over rows and over columns of c, so that the largest share is small. Each thread packs
// what it reads.
Grid grid_of(const ProductArgs& p) {
  const double flops = 2.0 * p.rows * p.columns * p.depth;
  const auto threads = std::min<std::int64_t>(
      at::get_num_threads(), 1 + static_cast<std::int64_t>(flops / kFlopsPerThread));
  Grid best{1, 1};
  double least = 0;
  for (std::int64_t over_rows = 1; over_rows <= threads; ++over_rows) {
    const std::int64_t over_columns = threads / over_rows;
    const double rows = at::divup(p.rows, over_rows), columns = at::divup(p.columns, over_columns);
    const double cost = rows * columns + kPackedA * rows + kPackedB * columns;
    if (over_rows > 1 && cost >= least) continue;
    least = cost;
    best = {over_rows, over_columns};
  }
  return best;
}

constexpr std::int64_t kWholePanel = 32;  // columns are cut at multiples of it

void compute(ProductArgs p) {
  if (p.rows < kFewRows && p.b.row == 1)  // a few rows fill the registers as columns
    p = {p.columns,
         p.rows,
         p.depth,
         {p.b.data, p.b.column, p.b.row},
         {p.a.data, p.a.column, p.a.row},
         {p.c.data, p.c.column, p.c.row},
         p.add};
  if (p.rows == 0 || p.columns == 0) return;
  const Grid grid = grid_of(p);
  const std::int64_t panels = at::divup(p.columns, kWholePanel);
  at::parallel_for(0, grid.rows * grid.columns, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t cell = begin; cell < end; ++cell) {
      const std::int64_t i = cell / grid.columns, j = cell % grid.columns;
      cpu_kernels().product(p, p.rows * i / grid.rows, p.rows * (i + 1) / grid.rows,
                            panels * j / grid.columns * kWholePanel,
                            std::min(panels * (j + 1) / grid.columns * kWholePanel, p.columns));
    }
  });
}

bool is_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

// MKL takes AVX-512 on Intel's processors only: on others with it ours is twice as fast.
bool own_products() {
  static const bool intel = is_intel();
  return at::hasMKL() && !intel && std::string_view(cpu_kernels().instruction_set) == "AVX512";
}

void own_product_(Tensor out, const Tensor& a, const Tensor& b, bool add) {
  const char* op = "product_";
  check_matrix(op, "a", a);
  check_matrix(op, "b", b);
  check_matrix(op, "out", out);
  MEGARLX_CHECK(op, b.size(0) == a.size(1), "b's shape", b.sizes(),
                c10::str("[", a.size(1), ", columns], for a's ", a.sizes()));
  MEGARLX_CHECK(op, out.sizes() == at::IntArrayRef({a.size(0), b.size(1)}), "out's shape",
                out.sizes(), c10::str("[", a.size(0), ", ", b.size(1), "]"));
  MEGARLX_CHECK(op, out.is_contiguous(), "out's strides", out.strides(), "contiguous");
  at::assert_no_overlap(out, a);
  at::assert_no_overlap(out, b);
  const Tensor left = by_rows_or_columns(a), right = by_rows_or_columns(b);
  compute({a.size(0),
           b.size(1),
           a.size(1),
           strided(left),
           strided(right),
           {out.mutable_data_ptr<float>(), out.size(1), 1},
           add});
  out.unsafeGetTensorImpl()->bump_version();
}

void product_(Tensor out, const Tensor& a, const Tensor& b, bool add) {
  if (out.is_cpu() && out.scalar_type() == at::kFloat && own_products())
    own_product_(out, a, b, add);
  else if (add)
    at::addmm_out(out, out, a, b, /*beta=*/1, /*alpha=*/1);
  else
    at::mm_out(out, a, b);
}

}  // namespace megarlx
