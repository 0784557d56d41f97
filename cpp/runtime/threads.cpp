#include "runtime/threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace zerofl {
namespace {

using Gomp = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// A second runtime's threads would spin against torch's on the same cores, so we borrow torch's.
Gomp gomp_parallel = nullptr;

// The threads of a pool do not exist in a forked child; waiting for them there would hang.
std::atomic<bool> forked{false};

struct Job {
  const std::function<void(int64_t)>& work;
  int64_t items;
  std::atomic<int64_t> next{0};
  std::mutex mutex{};
  std::exception_ptr error{};

  void run() {
    try {
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(item);
    } catch (...) {
      std::lock_guard lock(mutex);
      error = std::current_exception();
      next = items;
    }
  }
};

void run_job(void* job) { static_cast<Job*>(job)->run(); }

}  // namespace

bool use_openmp_of(const char* path) {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { forked = true; }); });
  if (void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD)) {
    gomp_parallel = reinterpret_cast<Gomp>(dlsym(library, "GOMP_parallel"));
    dlclose(library);
  }
  return gomp_parallel != nullptr;
}

void parallel(int threads, int64_t items, const std::function<void(int64_t)>& work) {
  threads = forked ? 1 : static_cast<int>(std::min<int64_t>(threads, items));
  Job job{work, items};
  if (threads <= 1) {
    job.run();
  } else if (gomp_parallel) {
    gomp_parallel(run_job, &job, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> helpers;
    try {
      for (int i = 1; i < threads; ++i) helpers.emplace_back(run_job, &job);
    } catch (const std::exception&) {
      // The system gives no more threads: those there are, and this one, share the items.
    }
    job.run();
    for (auto& helper : helpers) helper.join();
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace zerofl
