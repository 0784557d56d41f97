// Work shared among torch's own OpenMP threads.
#pragma once

#include <cstdint>
#include <functional>

namespace zerofl {

// Use the OpenMP runtime that the library at `path` (torch's) links to. Returns false if it has none.
bool use_openmp_of(const char* path);

// Call work(item) for every item in [0, items), in any order, on up to `threads` threads. An item is done by one thread
// and items share no sums, so results do not depend on the number of threads.
void parallel(int threads, int64_t items, const std::function<void(int64_t)>& work);

}  // namespace zerofl
