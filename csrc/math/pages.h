// Where the tokens of a sequence lie in a cache of pages, all of one number of places.
#pragma once
#include "math/common.h"

namespace megarlx {

// A slot's row of the table is [first, n pages, n pages]: its `first` tokens lie in pages that
// other slots may name too, what follows in pages of its own, from the beginning of the first of
// them. So the samples of a prompt share it to its last token, whatever its length, and each writes
// only where no other reads. Without a table a slot is a page.
struct SlotPages {
  const std::int32_t* row;
  std::int64_t slot, count, size;  // count is n, size the places of a page

  MEGARLX_HD static SlotPages of(const std::int32_t* table, std::int64_t slot, std::int64_t count,
                                 std::int64_t size) {
    return {table == nullptr ? nullptr : table + slot * (1 + 2 * count), slot, count, size};
  }
  MEGARLX_HD std::int64_t shared() const { return row == nullptr ? 0 : row[0]; }
  // The shared ones are columns 0 … n - 1, the own ones n … 2n - 1.
  MEGARLX_HD std::int64_t page(std::int64_t column) const {
    return row == nullptr ? slot : row[1 + column];
  }
  MEGARLX_HD std::int64_t first_own() const { return row == nullptr ? 0 : count; }
  // Of all places of the cache; -1 where the slot has none for it. In 32 bits, which saves
  // registers: a negative number is a large one.
  MEGARLX_HD std::int64_t place(std::int64_t position) const {
    const bool own = position >= shared();
    const auto inside = static_cast<std::uint32_t>(own ? position - shared() : position);
    const auto each = static_cast<std::uint32_t>(size), column = inside / each;
    if (column >= static_cast<std::uint32_t>(count)) return -1;
    const std::int64_t found = page((own ? first_own() : 0) + column);
    return found < 0 ? -1 : found * size + (inside - column * each);
  }
};

}  // namespace megarlx
