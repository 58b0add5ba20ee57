// What a token dataset needs to know where a sample lies: a permutation without memory, the start
// of every sample in a shuffled stream of documents, and the order in which sources are mixed.
// Everything is integer arithmetic and a pure function of its arguments: the same on every machine.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace py = pybind11;

namespace megarlx::index {
namespace {

using std::int64_t;
using std::uint64_t;
using Int128 = __int128;

constexpr int64_t kMost = int64_t{1} << 62;

template <typename Value>
[[noreturn]] void refuse(const std::string& argument, const Value& value,
                         const std::string& allowed) {
  std::string given;
  if constexpr (std::is_floating_point_v<Value>)
    given = py::str(py::float_(value));  // call it with the GIL
  else if constexpr (std::is_integral_v<Value>)
    given = std::to_string(value);
  else
    given = value;
  throw py::value_error("megarlx._index: " + argument + " is " + given + "; allowed: " + allowed);
}

uint64_t checked_seed(const py::int_& seed) {
  const uint64_t value = PyLong_AsUnsignedLongLong(seed.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    refuse("seed", std::string(py::str(seed)), "0 to 2^64 - 1");
  }
  return value;
}

int64_t checked_size(const char* name, const py::int_& size, int64_t least) {
  const int64_t value = PyLong_AsLongLong(size.ptr());
  if (PyErr_Occurred() != nullptr || value < least || value > kMost) {
    PyErr_Clear();
    refuse(name, std::string(py::str(size)), std::to_string(least) + " to 2^62");
  }
  return value;
}

// Without a conversion: one that truncates would go unseen.
template <typename T>
py::array_t<T> checked_array(const char* name, const py::array& array, const char* dtype) {
  if (!py::isinstance<py::array_t<T>>(array))
    refuse(std::string(name) + ".dtype", std::string(py::str(array.dtype())), dtype);
  return py::array_t<T, py::array::c_style | py::array::forcecast>(array);  // contiguous
}

// A bijection of 64 bits in which every input bit reaches every output bit.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

uint64_t key_of(uint64_t seed, uint64_t number) {
  return mix(mix(seed) + 0x9E3779B97F4A7C15u * (number + 1));
}

// A permutation of 0 … n - 1 that is computed and not stored: a keyed Feistel network permutes the
// numbers of just enough bits; what lands at n or above is sent through again until it does not,
// fewer than two times on average for n >= 256.
class Permutation {
 public:
  Permutation(int64_t n, uint64_t seed) : n_(static_cast<uint64_t>(n)) {
    const int bits = std::max<int>(kFewestBits, std::bit_width(n_ > 0 ? n_ - 1 : 0));
    low_bits_ = bits / 2;
    low_mask_ = (uint64_t{1} << low_bits_) - 1;
    high_mask_ = (uint64_t{1} << (bits - low_bits_)) - 1;
    for (int round = 0; round < kRounds; ++round) keys_[round] = key_of(seed, round);
  }

  int64_t operator()(int64_t index) const {
    uint64_t x = static_cast<uint64_t>(index);
    do {
      uint64_t low = x & low_mask_, high = x >> low_bits_;
      for (int round = 0; round < kRounds; round += 2) {
        high ^= mix(low + keys_[round]) & high_mask_;
        low ^= mix(high + keys_[round + 1]) & low_mask_;
      }
      x = (high << low_bits_) | low;
    } while (x >= n_);
    return static_cast<int64_t>(x);
  }

 private:
  static constexpr int kRounds = 8;
  static constexpr int kFewestBits = 8;  // halves of less than 4 bits would mix badly
  uint64_t n_, low_mask_, high_mask_, keys_[kRounds];
  int low_bits_;
};

py::array_t<int64_t> permute(const py::array& indices, const py::int_& n, const py::int_& seed) {
  const int64_t size = checked_size("n", n, 0);
  const Permutation permutation(size, checked_seed(seed));
  const auto from = checked_array<int64_t>("indices", indices, "int64");
  py::array_t<int64_t> to(std::vector<py::ssize_t>(from.shape(), from.shape() + from.ndim()));
  const int64_t* source = from.data();
  int64_t* target = to.mutable_data();
  const int64_t count = from.size();
  py::gil_scoped_release release;
  for (int64_t i = 0; i < count; ++i) {
    if (source[i] < 0 || source[i] >= size)
      refuse("indices[" + std::to_string(i) + "]", source[i],
             "0 <= index < n = " + std::to_string(size));
    target[i] = permutation(source[i]);
  }
  return to;
}

// The documents of all epochs in a row, each epoch in an order of its own: position -> document.
class DocumentOrder {
 public:
  DocumentOrder(int64_t documents, uint64_t seed)
      : documents_(documents), seed_(seed), permutation_(documents, key_of(seed, 0)) {}

  int64_t operator()(int64_t position) {
    const int64_t epoch = position / documents_;
    if (epoch != epoch_) {
      permutation_ = Permutation(documents_, key_of(seed_, static_cast<uint64_t>(epoch)));
      epoch_ = epoch;
    }
    return permutation_(position - epoch * documents_);
  }

 private:
  int64_t documents_, epoch_ = 0;
  uint64_t seed_;
  Permutation permutation_;
};

py::array_t<int64_t> documents_at(const py::array& positions, const py::int_& documents,
                                  const py::int_& seed) {
  DocumentOrder order(checked_size("documents", documents, 1), checked_seed(seed));
  const auto from = checked_array<int64_t>("positions", positions, "int64");
  py::array_t<int64_t> to(std::vector<py::ssize_t>(from.shape(), from.shape() + from.ndim()));
  const int64_t* source = from.data();
  int64_t* target = to.mutable_data();
  const int64_t count = from.size();
  py::gil_scoped_release release;
  for (int64_t i = 0; i < count; ++i) {
    if (source[i] < 0) refuse("positions[" + std::to_string(i) + "]", source[i], "0 or more");
    target[i] = order(source[i]);
  }
  return to;
}

int64_t tokens_in(const int32_t* lengths, int64_t documents) {
  int64_t tokens = 0;  // at most 2^62 documents of less than 2^31: looked at below
  for (int64_t d = 0; d < documents; ++d) {
    if (lengths[d] < 0)
      refuse("lengths[" + std::to_string(d) + "]", lengths[d], "0 or more tokens");
    if (__builtin_add_overflow(tokens, static_cast<int64_t>(lengths[d]), &tokens))
      refuse("the sum of lengths", std::string("above 2^63"), "below 2^63");
  }
  return tokens;
}

py::tuple sample_index(const py::array& lengths, const py::int_& sequence_length,
                       const py::int_& epochs, const py::int_& seed) {
  const int64_t tokens_a_sample = checked_size("sequence_length", sequence_length, 1);
  const int64_t times = checked_size("epochs", epochs, 1);
  const uint64_t key = checked_seed(seed);
  const auto held = checked_array<int32_t>("lengths", lengths, "int32");
  if (held.ndim() != 1) refuse("lengths.ndim", held.ndim(), "1");
  const int32_t* length = held.data();
  const int64_t documents = held.size();

  int64_t samples = 0;
  {
    py::gil_scoped_release release;
    const int64_t tokens = tokens_in(length, documents);
    int64_t stream = 0, positions = 0;
    if (__builtin_mul_overflow(tokens, times, &stream) ||
        __builtin_mul_overflow(documents, times, &positions))
      refuse("epochs", times,
             "less than 2^63 tokens in all, of " + std::to_string(tokens) + " in an epoch");
    samples = (stream - 1) / tokens_a_sample;
    if (stream < 1 || samples < 1)
      refuse("the number of tokens", stream,
             "at least sequence_length + 1 = " + std::to_string(tokens_a_sample + 1));
  }
  py::array_t<int64_t> position_array(samples + 1);
  py::array_t<int32_t> offset_array(samples + 1);
  int64_t* position = position_array.mutable_data();
  int32_t* offset = offset_array.mutable_data();
  {
    py::gil_scoped_release release;
    DocumentOrder order(documents, key);
    int64_t before = 0, boundary = 0;  // tokens before the document; the token that comes next
    for (int64_t p = 0, s = 0; s <= samples; ++p) {
      const int64_t after = before + length[order(p)];
      for (; s <= samples && boundary < after; ++s, boundary += tokens_a_sample) {
        position[s] = p;
        offset[s] = static_cast<int32_t>(boundary - before);
      }
      before = after;
    }
  }
  return py::make_tuple(position_array, offset_array);
}

// Shares as integers W_i of a whole W: everything after this is exact.
std::vector<int64_t> whole_shares(const double* weights, int64_t sources) {
  double largest = 0, sum = 0;
  for (int64_t i = 0; i < sources; ++i) {
    if (!(std::isfinite(weights[i]) && weights[i] >= 0))
      refuse("weights[" + std::to_string(i) + "]", weights[i], "finite, >= 0");
    largest = std::max(largest, weights[i]);
  }
  if (largest == 0) refuse("the sum of weights", 0, "more than 0");
  for (int64_t i = 0; i < sources; ++i) sum += weights[i] / largest;
  std::vector<int64_t> shares;
  for (int64_t i = 0; i < sources; ++i) {
    const int64_t share = std::llround(std::ldexp(weights[i] / largest / sum, 61));
    shares.push_back(weights[i] > 0 ? std::max<int64_t>(share, 1) : 0);
  }
  return shares;
}

// Source i is owed its next item from the step t at which t·w_i exceeds what it had (owed > 0), and
// must have it by the step at which the debt would reach 1. Serving the earliest deadline among
// those that are owed something meets them all: between any two steps a and b no more items fall
// due than there are steps. (Serving the largest debt first does
// not.) In units of 1/W the debts are integers between -W and W.
//
// The debts follow from what was served alone, so the order can be gone on with from any of its
// steps, and nobody needs to hold all of it.
py::tuple blend(const py::array_t<double, py::array::c_style | py::array::forcecast>& weights,
                const py::int_& n, const py::object& served_before) {
  const int64_t count = checked_size("n", n, 0);
  if (weights.ndim() != 1) refuse("weights.ndim", weights.ndim(), "1");
  const int64_t sources = weights.size();
  if (sources < 1 || sources > INT16_MAX)
    refuse("the number of weights", sources, "1 to " + std::to_string(INT16_MAX));
  const std::vector<int64_t> share = whole_shares(weights.data(), sources);
  int64_t whole = 0;
  for (int64_t w : share) whole += w;

  std::vector<int64_t> owed(sources, 0), served(sources, 0);
  if (!served_before.is_none()) {
    const auto given = checked_array<int64_t>("served", py::array(served_before), "int64");
    if (given.ndim() != 1 || given.size() != sources)
      refuse("the size of served", given.size(), "one number a weight: " + std::to_string(sources));
    Int128 steps = 0;
    for (int64_t i = 0; i < sources; ++i) {
      served[i] = given.data()[i];
      if (served[i] < 0) refuse("served[" + std::to_string(i) + "]", served[i], "0 or more");
      steps += served[i];
    }
    for (int64_t i = 0; i < sources; ++i) {
      const Int128 debt = steps * share[i] - static_cast<Int128>(served[i]) * whole;
      if (debt >= whole || debt <= -static_cast<Int128>(whole))
        refuse("served[" + std::to_string(i) + "]", served[i],
               "what these weights give in as many steps, to less than one item");
      owed[i] = static_cast<int64_t>(debt);
    }
  }
  py::array_t<int16_t> source_array(count);
  py::array_t<int64_t> index_array(count);
  int16_t* source = source_array.mutable_data();
  int64_t* index = index_array.mutable_data();
  {
    py::gil_scoped_release release;
    for (int64_t t = 0; t < count; ++t) {
      int64_t next = -1;
      for (int64_t i = 0; i < sources; ++i) {
        owed[i] += share[i];
        if (owed[i] <= 0) continue;
        // Steps left: (W - owed_i) / W_i.
        if (next < 0 || static_cast<Int128>(whole - owed[i]) * share[next] <
                            static_cast<Int128>(whole - owed[next]) * share[i])
          next = i;
      }
      owed[next] -= whole;
      source[t] = static_cast<int16_t>(next);
      index[t] = served[next]++;
    }
  }
  return py::make_tuple(source_array, index_array);
}

}  // namespace
}  // namespace megarlx::index

PYBIND11_MODULE(_index, m) {
  namespace index = megarlx::index;
  m.doc() = "Where samples lie: permutation, sample index and blending for token files";
  m.def("permute", &index::permute, py::arg("indices"), py::arg("n"), py::kw_only(),
        py::arg("seed"),
        "int64 indices below n -> int64 of the same shape: a seeded permutation of 0 … n - 1, "
        "computed index by index without any memory.");
  m.def("documents_at", &index::documents_at, py::arg("positions"), py::arg("documents"),
        py::kw_only(), py::arg("seed"),
        "int64 positions in the shuffled stream of documents of sample_index -> document numbers. "
        "Position e * documents + k is the k-th document of epoch e.");
  m.def(
      "sample_index", &index::sample_index, py::arg("lengths"), py::arg("sequence_length"),
      py::kw_only(), py::arg("epochs"), py::arg("seed"),
      "int32 document lengths -> (positions int64 [S + 1], offsets int32 [S + 1]): sample s is the "
      "sequence_length + 1 tokens from token offsets[s] of document positions[s] on, and the "
      "next one starts at its last token. S = (epochs * tokens - 1) // sequence_length.");
  m.def(
      "blend", &index::blend, py::arg("weights"), py::arg("n"), py::kw_only(),
      py::arg("served") = py::none(),
      "float64 weights, n -> (source int16 [n], index in the source int64 [n]): after every prefix "
      "each source has had its weight's share of the items, to less than one item. With `served` "
      "(int64, items each source has had) the n items that follow those.");
}
