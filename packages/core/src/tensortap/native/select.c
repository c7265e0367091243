/* Exact order statistics of differences, refined from histograms of their leading bits.
 *
 * Values are float64 without sign, which are ordered as their bits are. A target is a prefix of
 * those bits; the values that have one are collected, or counted by their next bits.
 */
#include <fenv.h>
#include <float.h>

#include "pairs.h"
#include "threads.h"

#define TARGETS 8
#define NEXT_BITS 12
#define NEXT (1 << NEXT_BITS)
/* For pairs that are not finite on both sides: negative, so no prefix is its own. */
#define NOT_COUNTED (-1.0)

/* Prefixes of the bits from `shift` on; unused ones are INT64_MAX, which no value has. */
typedef struct {
    int64_t shift, prefix[TARGETS];
} targets;

/* Counts by next bits; `ones` and `zeros` are the bits that are set, and that are not, in any of
 * the values counted: where the two have none in common all values are equal. */
typedef struct {
    int64_t *counts;
    uint64_t *ones, *zeros;
} sieve;

/* Where values go: `found`, with `room` for as many as there are, or the `rows` of a sieve, one
 * for each prefix and thread. */
typedef struct {
    targets wanted;
    int64_t *found, room, taken, rows;
    sieve refined;
} quest;

typedef struct {
    const side *ref, *other;
    const frame *f;
    int64_t n, tasks, next, slots;
    quest *quests[2]; /* of the differences and of the relative ones; NULL: nothing is wanted */
} job;

CLONES static void differences(const stored_double *ref, const stored_double *other, int64_t n,
                               const frame *given, double *apart_by, double *relative_by)
{
    const frame f = *given;
    _Pragma("omp simd")
    for (int64_t i = 0; i < n; i++) {
        const double d = apart(ref[i], other[i], &f);
        const double q = relative(d, ref[i], &f);
        apart_by[i] = fabs(d) <= DBL_MAX ? fabs(d) : NOT_COUNTED;
        relative_by[i] = fabs(d) <= DBL_MAX ? q : NOT_COUNTED;
    }
}

/* Leaves the bits of those values that have a wanted prefix; returns how many. */
CLONES static int64_t sift(const double *x, int64_t n, const targets *wanted, int64_t *kept)
{
    const targets w = *wanted;
    int64_t hits[PAIRS], any = 0;
    _Pragma("omp simd reduction(|:any)")
    for (int64_t i = 0; i < n; i++) {
        const int64_t key = bits_of(x[i]) >> w.shift;
        int64_t hit = 0;
        for (int t = 0; t < TARGETS; t++)
            hit |= key == w.prefix[t];
        hits[i] = hit;
        any |= hit;
    }
    int64_t count = 0;
    for (int64_t i = 0; any && i < n; i++) {
        kept[count] = bits_of(x[i]);
        count += hits[i];
    }
    return count;
}

static void collect(quest *q, const int64_t *kept, int64_t n)
{
    const int64_t at = __atomic_fetch_add(&q->taken, n, __ATOMIC_RELAXED);
    if (at + n <= q->room)
        memcpy(q->found + at, kept, (size_t)n * sizeof *kept);
}

static int64_t place_in_sieve(const targets *wanted, int64_t bits)
{
    const int64_t next = wanted->shift < NEXT_BITS ? wanted->shift : NEXT_BITS;
    int64_t target = 0;
    while (wanted->prefix[target] != bits >> wanted->shift)
        target++;
    return target * NEXT + (bits >> (wanted->shift - next) & (((int64_t)1 << next) - 1));
}

static void refine(const quest *q, int64_t slot, const int64_t *kept, int64_t n)
{
    const int64_t own = slot * q->rows * NEXT;
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = own + place_in_sieve(&q->wanted, kept[i]);
        q->refined.counts[at]++;
        q->refined.ones[at] |= (uint64_t)kept[i];
        q->refined.zeros[at] |= ~(uint64_t)kept[i];
    }
}

static void pursue(quest *q, int64_t slot, const double *x, int64_t n)
{
    int64_t kept[PAIRS + 1];
    if (!q)
        return;
    const int64_t count = sift(x, n, &q->wanted, kept);
    if (count && q->found)
        collect(q, kept, count);
    else if (count)
        refine(q, slot, kept, count);
}

static void do_task(const job *j, int64_t slot, int64_t task)
{
    double ref_values[PAIRS], other_values[PAIRS], apart_by[PAIRS], relative_by[PAIRS];
    uint8_t ref_bytes[PAIRS], other_bytes[PAIRS];
    const int64_t stop = j->n < (task + 1) * PAIRS_TASK ? j->n : (task + 1) * PAIRS_TASK;
    for (int64_t start = task * PAIRS_TASK; start < stop; start += PAIRS) {
        const int64_t n = stop - start < PAIRS ? stop - start : PAIRS;
        const char *ref = stored_at(j->ref, start, n, ref_bytes);
        const char *other = stored_at(j->other, start, n, other_bytes);
        differences(values_at(j->ref, ref, n, ref_values),
                    values_at(j->other, other, n, other_values), n, j->f, apart_by, relative_by);
        pursue(j->quests[0], slot, apart_by, n);
        pursue(j->quests[1], slot, relative_by, n);
    }
}

static void take_tasks(void *argument)
{
    job *j = argument;
    fenv_t before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    const int64_t slot = __atomic_fetch_add(&j->slots, 1, __ATOMIC_RELAXED);
    int64_t task;
    while ((task = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->tasks)
        do_task(j, slot, task);
    fesetenv(&before);
}

/* Look for the values of two quests, either of which may be NULL, among `n` pairs. */
void tensortap_compare_select(const side *ref, const side *other, const frame *f, int64_t n,
                              quest *absolute, quest *relatives, int64_t threads)
{
    job j = {.ref = ref, .other = other, .f = f, .n = n,
             .tasks = (n + PAIRS_TASK - 1) / PAIRS_TASK, .quests = {absolute, relatives}};
    if (threads > 1 && j.tasks > 1 && tensortap_start_threads)
        tensortap_start_threads(take_tasks, &j, (unsigned)threads, 0);
    else
        take_tasks(&j);
}
