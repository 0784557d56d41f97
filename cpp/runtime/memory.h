// Memory for activations and gradients that is kept between steps.
//
// A training step frees and asks for the same few hundred megabytes again and again. Handed back to the system, they come
// as pages that must be faulted in and zeroed, which takes as long as the arithmetic on them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace zerofl {

// At least `bytes` bytes, on a cache line; freed with pool_free. All that is kept never exceeds twice what has been in use
// at one time.
void* pool_allocate(size_t bytes);
void pool_free(void* memory) noexcept;

// Memory that is not initialised, for what is about to be written.
template <class T>
struct Array {
  std::unique_ptr<T, void (*)(void*)> memory{nullptr, pool_free};

  void allocate(int64_t count) { memory.reset(static_cast<T*>(pool_allocate(count * sizeof(T)))); }
  T* data() const { return memory.get(); }
};

// A buffer of the calling thread that grows and stays; `slot` tells buffers in use at the same time apart.
constexpr int SLOTS = 5;
float* scratch(int slot, int64_t floats);

}  // namespace zerofl
