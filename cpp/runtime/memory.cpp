#include "runtime/memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <unordered_map>
#include <utility>

namespace zerofl {
namespace {

constexpr size_t SMALL = 1 << 14;  // bytes of what malloc itself keeps
constexpr size_t PAGE = 4096;

struct Pool {
  std::mutex mutex;
  std::map<char*, size_t> free;                        // by address; neighbours are joined
  std::set<std::pair<size_t, char*>> free_by_size;     // the same
  std::unordered_map<void*, size_t> used;
  size_t free_bytes = 0, used_bytes = 0, most_used_bytes = 0;

  void add_free(char* memory, size_t bytes) {
    free.emplace(memory, bytes);
    free_by_size.emplace(bytes, memory);
    free_bytes += bytes;
  }

  void remove_free(char* memory, size_t bytes) {
    free.erase(memory);
    free_by_size.erase({bytes, memory});
    free_bytes -= bytes;
  }
};

// Never destroyed: tensors may outlive the end of main.
Pool& pool() {
  static Pool* pool = [] {
    // A thread that is in here while another one forks would leave its lock locked in the child.
    pthread_atfork([] { zerofl::pool().mutex.lock(); }, [] { zerofl::pool().mutex.unlock(); },
                   [] { zerofl::pool().mutex.unlock(); });
    return new Pool;
  }();
  return *pool;
}

char* map_pages(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

}  // namespace

void* pool_allocate(size_t bytes) {
  if (bytes < SMALL) {
    if (void* memory = std::aligned_alloc(64, (bytes / 64 + 1) * 64)) return memory;
    throw std::bad_alloc();
  }
  if (bytes > SIZE_MAX - PAGE) throw std::bad_alloc();
  bytes = (bytes + PAGE - 1) / PAGE * PAGE;
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  const auto fit = p.free_by_size.lower_bound({bytes, nullptr});
  char* memory;
  if (fit != p.free_by_size.end()) {
    const auto [block, start] = *fit;
    memory = start;
    p.remove_free(start, block);
    if (block > bytes) p.add_free(start + bytes, block - bytes);
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
  if (block == p.used.end()) return std::free(memory);
  char* start = static_cast<char*>(memory);
  size_t bytes = block->second;
  p.used.erase(block);
  p.used_bytes -= bytes;
  const auto next = p.free.find(start + bytes);
  if (next != p.free.end()) {
    const size_t more = next->second;
    p.remove_free(start + bytes, more);
    bytes += more;
  }
  const auto behind = p.free.lower_bound(start);
  if (behind != p.free.begin()) {
    const auto [before, size] = *std::prev(behind);
    if (before + size == start) {
      p.remove_free(before, size);
      start = before, bytes += size;
    }
  }
  p.add_free(start, bytes);
  while (p.free_bytes + p.used_bytes > 2 * p.most_used_bytes) {
    const auto [size, largest] = *p.free_by_size.rbegin();
    munmap(largest, size);
    p.remove_free(largest, size);
  }
}

float* scratch(int slot, int64_t floats) {
  struct Buffer {
    float* memory = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(memory); }
  };
  static thread_local Buffer buffers[SLOTS];
  Buffer& buffer = buffers[slot];
  if (buffer.size < floats) {
    std::free(buffer.memory);
    buffer.size = 0;
    buffer.memory = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
    if (!buffer.memory) throw std::bad_alloc();
    buffer.size = floats;
  }
  return buffer.memory;
}

}  // namespace zerofl
