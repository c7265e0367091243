/* How often each pair of codes occurs in two tensors whose elements are codes of a byte or less:
 * of what they are worth, all else follows. */
#include "pairs.h"
#include "threads.h"

#define PAIRS_OF_CODES 65536

/* For each thread, by code of the reference times 256 plus that of the other: how often, and
 * where first. */
typedef struct {
    const side *ref, *other;
    int64_t n, first, tasks, next, slots;
    int64_t *times, *places;
} job;

static void count(const uint8_t *ref, const uint8_t *other, int64_t n, int64_t first,
                  int64_t *times, int64_t *places)
{
    for (int64_t i = 0; i < n; i++) {
        const int64_t pair = (int64_t)ref[i] << 8 | other[i];
        if (!times[pair]++)
            places[pair] = first + i;
    }
}

/* Runs on every thread until no task is left; a thread's tasks follow each other, so that what it
 * sees first does stand first. */
static void take_tasks(void *argument)
{
    job *j = argument;
    uint8_t ref_bytes[PAIRS], other_bytes[PAIRS];
    const int64_t slot = __atomic_fetch_add(&j->slots, 1, __ATOMIC_RELAXED);
    int64_t *times = j->times + slot * PAIRS_OF_CODES, *places = j->places + slot * PAIRS_OF_CODES;
    int64_t task;
    while ((task = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->tasks) {
        const int64_t stop = j->n < (task + 1) * PAIRS_TASK ? j->n : (task + 1) * PAIRS_TASK;
        for (int64_t start = task * PAIRS_TASK; start < stop; start += PAIRS) {
            const int64_t n = stop - start < PAIRS ? stop - start : PAIRS;
            count((const uint8_t *)stored_at(j->ref, start, n, ref_bytes),
                  (const uint8_t *)stored_at(j->other, start, n, other_bytes), n,
                  j->first + start, times, places);
        }
    }
}

/* Count `n` pairs, the first of which stands at `first` in the tensors. */
void tensortap_compare_codes(const side *ref, const side *other, int64_t n, int64_t first,
                             int64_t *times, int64_t *places, int64_t threads)
{
    job j = {.ref = ref, .other = other, .n = n, .first = first, .times = times, .places = places,
             .tasks = (n + PAIRS_TASK - 1) / PAIRS_TASK};
    if (threads > 1 && j.tasks > 1 && tensortap_start_threads)
        tensortap_start_threads(take_tasks, &j, (unsigned)threads, 0);
    else
        take_tasks(&j);
}
