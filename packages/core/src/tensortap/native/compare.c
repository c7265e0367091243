/* Sums and histograms of two tensors and their difference, in one pass.
 *
 * Pairs are cut into tasks of fixed size. Threads take tasks as they come, each leaves its own
 * totals, and those are merged in order: the result does not depend on threads. Histograms count
 * the leading bits of float64 differences, and whether any is set below: of each thread by itself.
 */
#include <fenv.h>
#include <stdlib.h>

#include "threads.h"
#include "totals.h"

/* A key is the exponent and 7 bits of the mantissa. There are as many for negative values, and
 * once more as many of either sign for values with a rest below. */
#define KEY_SHIFT 45
#define ROW_SHIFT 52
#define KEYS (1 << 18)
#define ROW (1 << 7)
#define QUARTERS 4
#define REST (1 << 19)
/* Before a thread's 32-bit counts can overflow. */
#define TASKS_TO_FLUSH 65536

/* Counts by keys, or NULL where rows do, and by rows: sign and exponent only. */
typedef struct {
    int64_t *keys, *rows;
} histogram;

/* One thread's counts of keys, and which of them, zero apart, occur. Without keys it is the only
 * thread, and counts where all are counted. */
typedef struct {
    uint32_t *counts;
    int64_t *rows;
    int64_t lowest, highest;
} key_counts;

typedef struct {
    const side *ref, *other;
    const frame *f;
    int64_t n, first, tasks, next, slots;
    totals *parts;
    uint32_t *scratch;
    histogram absolute, relative;
} job;

static int same_kind(const job *j)
{
    return j->ref->kind == j->other->kind && j->ref->table == j->other->table;
}

/* Two tables side by side would not help: neighbours seldom share a key of 7 mantissa bits. */
CLONES static void count_keys(const double *x, int64_t n, key_counts *to)
{
    int64_t least = INT64_MAX, most = 0;
    uint32_t keys[PAIRS];
    _Pragma("omp simd reduction(min:least) reduction(max:most)")
    for (int64_t i = 0; i < n; i++) {
        const int64_t bits = bits_of(x[i]), size = bits & MAGNITUDE_OF_DOUBLE;
        const uint32_t rest = (bits & (((int64_t)1 << KEY_SHIFT) - 1)) != 0;
        keys[i] = (uint32_t)((uint64_t)bits >> KEY_SHIFT) | rest * REST;
        const int64_t not_zero = size ? size : INT64_MAX;
        ORDER_MIN(least, not_zero);
        ORDER_MAX(most, size);
    }
    for (int64_t i = 0; i < n; i++)
        to->counts[keys[i]]++;
    ORDER_MIN(to->lowest, least >> KEY_SHIFT);
    ORDER_MAX(to->highest, most >> KEY_SHIFT);
}

static void count_rows(const double *x, int64_t n, int64_t *rows)
{
    for (int64_t i = 0; i < n; i++)
        rows[(uint64_t)bits_of(x[i]) >> ROW_SHIFT]++;
}

static void count(const double *x, int64_t n, key_counts *to)
{
    if (to->counts)
        count_keys(x, n, to);
    else
        count_rows(x, n, to->rows);
}

static void count_zeros(int64_t n, key_counts *to)
{
    if (to->counts)
        to->counts[0] += (uint32_t)n;
    else
        to->rows[0] += n;
}

static void add_odd(double ref, double other, totals *t)
{
    t->nan_ref += isnan(ref) != 0;
    t->nan_other += isnan(other) != 0;
    t->inf_ref += isinf(ref) != 0;
    t->inf_other += isinf(other) != 0;
    t->mismatches += !(isnan(ref) && isnan(other)) && ref != other;
}

/* A block's stored elements, its values, and where they stand in the tensor if not in a row. */
typedef struct {
    const char *ref, *other;
    const stored_double *r, *o;
    int64_t n, first;
    const int64_t *places;
} block;

static void copy_element(char *to, const char *from, int64_t at, int64_t place, int64_t size)
{
    memcpy(to + at * size, from + place * size, (size_t)size);
}

/* Counts the pairs that are not finite on both sides, and keeps the stored elements of others. */
static int64_t keep_finite(const job *j, const block *b, char *ref, char *other, int64_t *places,
                           totals *t)
{
    const int64_t ref_size = stored_size(j->ref->kind), other_size = stored_size(j->other->kind);
    int64_t kept = 0;
    for (int64_t i = 0; i < b->n; i++)
        if (isfinite(b->r[i]) && isfinite(b->o[i])) {
            copy_element(ref, b->ref, kept, i, ref_size);
            copy_element(other, b->other, kept, i, other_size);
            places[kept++] = b->first + i;
        } else {
            add_odd(b->r[i], b->o[i], t);
        }
    return kept;
}

/* The rest of what is computed of pairs that are all finite, once their sides are added. */
static void add_finite(const job *j, const block *b, key_counts *counts, totals *t)
{
    double apart_by[PAIRS], relative_by[PAIRS];
    add_differences(b->r, b->o, b->n, j->f, apart_by, relative_by, t);
    t->at = place_of(apart_by, b->n, t->largest);
    t->at = b->places ? b->places[t->at] : b->first + t->at;
    if (same_kind(j) && j->ref->is_float)
        add_ulps(j->ref, b->ref, b->other, b->n, t);
    if (t->zero == b->n) {
        count_zeros(b->n, counts);
        count_zeros(b->n, counts + 1);
        return;
    }
    count(apart_by, b->n, counts);
    count(relative_by, b->n, counts + 1);
}

static void add_pairs(const job *j, block b, key_counts *counts, totals *t);

static void add_what_is_finite(const job *j, const block *b, key_counts *counts, totals *t)
{
    char ref[PAIRS * 8], other[PAIRS * 8];
    int64_t places[PAIRS];
    const int64_t n = keep_finite(j, b, ref, other, places, t);
    if (n)
        add_pairs(j, (block){ref, other, NULL, NULL, n, b->first, places}, counts, t);
}

/* Sums show that a value is not finite. Those of huge finite ones overflow too: their block goes
 * through the sieve and comes back whole. */
static void add_pairs(const job *j, block b, key_counts *counts, totals *t)
{
    double ref[PAIRS], other[PAIRS];
    b.r = values_at(j->ref, b.ref, b.n, ref);
    b.o = values_at(j->other, b.other, b.n, other);
    totals sides = NO_PAIRS;
    add_sides(b.r, b.o, b.n, j->f, &sides);
    if (!b.places && !isfinite(sides.ref.m2 + sides.other.m2)) {
        add_what_is_finite(j, &b, counts, t);
        return;
    }
    t->compared = sides.compared;
    t->ref = sides.ref;
    t->other = sides.other;
    t->comoment = sides.comoment;
    t->abs_ref = sides.abs_ref;
    add_finite(j, &b, counts, t);
}

static void do_task(const job *j, int64_t task, key_counts *counts)
{
    uint8_t ref_bytes[PAIRS], other_bytes[PAIRS];
    const int64_t stop = j->n < (task + 1) * PAIRS_TASK ? j->n : (task + 1) * PAIRS_TASK;
    totals *all = &j->parts[task];
    *all = NO_PAIRS;
    for (int64_t start = task * PAIRS_TASK; start < stop; start += PAIRS) {
        const int64_t n = stop - start < PAIRS ? stop - start : PAIRS;
        totals some = NO_PAIRS;
        const block b = {stored_at(j->ref, start, n, ref_bytes),
                         stored_at(j->other, start, n, other_bytes), NULL, NULL, n,
                         j->first + start, NULL};
        add_pairs(j, b, counts, &some);
        some.count = n;
        some.unequal = !same_kind(j) || memcmp(b.ref, b.other, (size_t)(n * stored_size(j->ref->kind))) != 0;
        merge_totals(all, &some);
    }
}

static void flush_row(uint32_t *from, int64_t row, int64_t *keys, int64_t *rows)
{
    int64_t sum = 0;
    for (int64_t key = row * ROW; key < (row + 1) * ROW; key++) {
        if (from[key])
            __atomic_fetch_add(&keys[key], from[key], __ATOMIC_RELAXED);
        sum += from[key];
        from[key] = 0;
    }
    if (sum)
        __atomic_fetch_add(&rows[row % (2 * KEYS / ROW)], sum, __ATOMIC_RELAXED);
}

/* Add one thread's counts to all, and leave zeros. */
static void flush(const key_counts *from, const histogram *to)
{
    const int64_t quarter = KEYS / ROW, first = from->lowest / ROW, last = from->highest / ROW;
    for (int64_t row = first; from->counts && row <= last; row++)
        for (int64_t at = row; at < QUARTERS * quarter; at += quarter)
            flush_row(from->counts, at, to->keys, to->rows);
    if (from->counts && first)
        flush_row(from->counts, 0, to->keys, to->rows);
}

static void flush_both(const key_counts *counts, const job *j)
{
    flush(&counts[0], &j->absolute);
    flush(&counts[1], &j->relative);
}

/* Runs on every thread until no task is left, in the default floating-point environment: a thread
 * that flushes subnormals to zero would find fewer differences. */
static void take_tasks(void *argument)
{
    job *j = argument;
    fenv_t before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    const int64_t slot = __atomic_fetch_add(&j->slots, 1, __ATOMIC_RELAXED);
    uint32_t *mine = j->scratch ? j->scratch + slot * 2 * QUARTERS * KEYS : NULL;
    key_counts counts[2] = {{mine, j->absolute.rows, KEYS, 0},
                            {mine ? mine + QUARTERS * KEYS : NULL, j->relative.rows, KEYS, 0}};
    int64_t task, taken = 0;
    while ((task = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->tasks) {
        do_task(j, task, counts);
        if (++taken % TASKS_TO_FLUSH == 0)
            flush_both(counts, j);
    }
    flush_both(counts, j);
    fesetenv(&before);
}

/* From the first pair that is finite on both sides: a value of the tensors is never farther from
 * the mean than the farthest of them. */
static void set_origins(const side *ref, const side *other, int64_t n, frame *f)
{
    double ref_values[PAIRS], other_values[PAIRS];
    uint8_t ref_bytes[PAIRS], other_bytes[PAIRS];
    for (int64_t start = 0; start < n; start += PAIRS) {
        const int64_t some = n - start < PAIRS ? n - start : PAIRS;
        const char *from = stored_at(ref, start, some, ref_bytes);
        const stored_double *r = values_at(ref, from, some, ref_values);
        const stored_double *o = values_at(other, stored_at(other, start, some, other_bytes), some,
                                           other_values);
        for (int64_t i = 0; i < some; i++)
            if (isfinite(r[i]) && isfinite(o[i])) {
                f->ref_origin = r[i] * f->ref;
                f->other_origin = o[i] * f->other;
                f->difference_origin = apart(r[i], o[i], f) * f->difference;
                return;
            }
    }
}

/* Add `n` pairs, the first of which stands at `first` in the tensors, to `all`, and the keys of
 * their differences to the two histograms. `scratch` has 8 * KEYS zeros a thread and is left so,
 * or is NULL for one thread that counts rows. The first pairs that can be compared set the origins.
 * Returns 0, or -1 when there is no memory for the tasks' totals. */
int64_t tensortap_compare(const side *ref, const side *other, frame *f, int64_t n,
                          int64_t first, totals *all, const histogram *absolute,
                          const histogram *relative, uint32_t *scratch, int64_t threads)
{
    const int64_t tasks = (n + PAIRS_TASK - 1) / PAIRS_TASK;
    totals few[4], *parts = few;
    if (tasks > 4 && !(parts = malloc((size_t)tasks * sizeof *parts)))
        return -1;
    if (!all->compared)
        set_origins(ref, other, n, f);
    job j = {.ref = ref, .other = other, .f = f, .n = n, .first = first, .tasks = tasks,
             .parts = parts, .scratch = scratch, .absolute = *absolute, .relative = *relative};
    if (threads > 1 && tasks > 1 && tensortap_start_threads)
        tensortap_start_threads(take_tasks, &j, (unsigned)threads, 0);
    else
        take_tasks(&j);
    for (int64_t task = 0; task < tasks; task++)
        merge_totals(all, &parts[task]);
    if (parts != few)
        free(parts);
    return 0;
}
