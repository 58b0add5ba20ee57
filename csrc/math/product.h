// What a product of two matrices in fp32 is told.
#pragma once
#include <cstdint>

namespace megarlx {

// A matrix where it lies: elements from a row to the next, and from a column to the next.
template <class T>
struct Strided {
  T* data;
  std::int64_t row, column;
};

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]. One stride of each is 1.
struct ProductArgs {
  std::int64_t rows, columns, depth;
  Strided<const float> a, b;
  Strided<float> c;
  bool add;
};

}  // namespace megarlx
