/* Work cut into tasks, shared among torch's threads. */
#ifndef TENSORTAP_TASKS_H
#define TENSORTAP_TASKS_H

#include <fenv.h>
#include <stddef.h>
#include <stdint.h>

#include "threads.h"

/* Values that are worth asking for the next task. */
#define TASK 16384

typedef struct {
    void (*work)(void *, int64_t);
    void *argument;
    int64_t tasks, batch, next;
} shared_work;

/* Runs on every thread until no task is left. The default floating-point environment: a thread
 * that flushes subnormals to zero has no scale of 2^-127. */
static void take_tasks(void *argument)
{
    shared_work *s = argument;
    fenv_t before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    int64_t first;
    while ((first = __atomic_fetch_add(&s->next, s->batch, __ATOMIC_RELAXED)) < s->tasks)
        for (int64_t task = first; task < first + s->batch && task < s->tasks; task++)
            s->work(s->argument, task);
    fesetenv(&before);
}

/* Call `work` for each of `tasks` tasks, each of `size` values or less. */
static void share(void (*work)(void *, int64_t), void *argument, int64_t tasks, int64_t size,
                  int64_t threads)
{
    shared_work s = {work, argument, tasks, 1 + TASK / (size + 1), 0};
    if (threads > 1 && tasks > s.batch && tensortap_start_threads)
        tensortap_start_threads(take_tasks, &s, (unsigned)threads, 0);
    else
        take_tasks(&s);
}

#endif
