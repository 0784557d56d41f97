#include "pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

namespace zerofl {
namespace {

struct Pool {
  std::mutex mutex;
  std::multimap<size_t, void*> free;
  std::unordered_map<void*, size_t> used;
  size_t free_bytes = 0, used_bytes = 0, most_used_bytes = 0;
};

// Never destroyed: tensors may outlive the end of main.
Pool& pool() {
  static Pool* pool = new Pool;
  return *pool;
}

void* map_pages(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* pool_allocate(size_t bytes) {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  bytes = (std::max<size_t>(bytes, 1) + 4095) / 4096 * 4096;
  const auto fit = p.free.lower_bound(bytes);
  void* memory;
  if (fit != p.free.end() && fit->first <= bytes + bytes / 4) {
    bytes = fit->first, memory = fit->second;
    p.free_bytes -= bytes;
    p.free.erase(fit);
  } else {
    memory = map_pages(bytes);
  }
  p.used.emplace(memory, bytes);
  p.used_bytes += bytes;
  p.most_used_bytes = std::max(p.most_used_bytes, p.used_bytes);
  return memory;
}

void pool_free(void* memory) noexcept {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  const auto block = p.used.find(memory);
  p.used_bytes -= block->second;
  p.free.emplace(block->second, memory);
  p.free_bytes += block->second;
  p.used.erase(block);
  while (p.free_bytes + p.used_bytes > 2 * p.most_used_bytes) {
    const auto largest = std::prev(p.free.end());
    munmap(largest->second, largest->first);
    p.free_bytes -= largest->first;
    p.free.erase(largest);
  }
}

}  // namespace zerofl
