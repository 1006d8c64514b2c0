// Tasks on threads. Which thread runs a task, and when, never changes what the task computes.
#pragma once
#include <cstdint>

namespace openmsa {

using Task = void (*)(void* context, int64_t task, int worker);

// Runs task(context, i, worker) for every i below `tasks`, on at most `threads` workers numbered from 0.
// One worker, or one task, runs on the calling thread alone. Tasks start in the order of their numbers.
void run_tasks(int threads, int64_t tasks, Task task, void* context);

// Memory aligned to 64 bytes that is not set to anything; null if there is none.
void* allocate(int64_t bytes);
void release(void* memory);

}  // namespace openmsa
