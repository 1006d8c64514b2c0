#include "threads.h"

#include <atomic>
#include <cstdlib>

#if !defined(_OPENMP)
#include <thread>
#include <vector>
#endif

namespace openmsa {

namespace {
void work(std::atomic<int64_t>& next, int64_t tasks, Task task, void* context, int worker) {
  for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(context, i, worker);
}
}  // namespace

void run_tasks(int threads, int64_t tasks, Task task, void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
    return;
  }
  std::atomic<int64_t> next{0};
#if defined(_OPENMP)
  // torch brings libgomp: the same library means the same pool of threads.
  std::atomic<int> workers{0};
#pragma omp parallel num_threads(threads)
  work(next, tasks, task, context, workers.fetch_add(1, std::memory_order_relaxed));
#else
  std::vector<std::thread> others;
  for (int worker = 1; worker < threads; ++worker)
    others.emplace_back([&, worker] { work(next, tasks, task, context, worker); });
  work(next, tasks, task, context, 0);
  for (auto& other : others) other.join();
#endif
}

void* allocate(int64_t bytes) {
  return std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64 + 64));
}

void release(void* memory) { std::free(memory); }

}  // namespace openmsa
