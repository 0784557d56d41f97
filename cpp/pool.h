// Memory for activations and gradients that is kept between steps.
//
// A training step frees and asks for the same few hundred megabytes again and again. Handed back to the system, they come
// as pages that must be faulted in and zeroed, which takes as long as the arithmetic on them.
#pragma once

#include <cstddef>

namespace zerofl {

// At least `bytes` bytes, on a cache line; freed with pool_free. All that is kept never exceeds twice what has been in use
// at one time.
void* pool_allocate(size_t bytes);
void pool_free(void* memory) noexcept;

}  // namespace zerofl
