/* Statistics of one tensor; called through ctypes, see __init__.py for the other side.
 *
 * The tensor is cut into chunks of fixed size. Threads take chunks as they come, each chunk
 * leaves its own moments, and those are merged in order: the result does not depend on threads.
 */
#include <fenv.h>
#include <stdlib.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "signs and 4-bit values are found by their place in little-endian storage"
#endif

#include "blocks.h"
#include "threads.h"
#include "walk.h"

#define CHUNK (32 * BLOCK)
#define LEADING 10
#define TABLES 16
/* The kind with two 4-bit values a byte, the low bits first; its table has 16 values. */
#define FP4 BYTE_KINDS

typedef struct {
    int64_t count, nan, posinf, neginf, zero;
    double min, max, absmax, mean, std, rms, l1, l2, first[LEADING];
} result;

typedef struct {
    walk w;
    int kind;
    double scale, origin; /* the origin in units of 1 / scale */
    int64_t chunks, next;
    part *parts;
    int64_t *codes; /* byte kinds: how often each of the 256 occurs */
    int64_t *exponents; /* or NULL */
} job;

parallel_start tensortap_start_threads;
static double tables[TABLES][256];

/* What the library was built from; a stale one beside newer sources is not used. */
const char *tensortap_source(void) { return TENSORTAP_SOURCE; }

/* `GOMP_parallel` of the OpenMP runtime torch itself runs on: no second pool of threads. */
void tensortap_set_threads(parallel_start start) { tensortap_start_threads = start; }

/* Values of the 256 codes of a byte kind (16 for 4-bit ones). */
void tensortap_set_table(int64_t kind, const double *values)
{
    memcpy(tables[kind - BYTE_KINDS], values, sizeof tables[0]);
}

static int64_t item_size(int kind)
{
    static const int64_t sizes[] = {4, 8, 2, 2, 2, 4, 8, 2, 4, 8};
    return kind < BYTE_KINDS ? sizes[kind] : 1;
}

static int is_double(int kind)
{
    return kind == F64 || kind == I32 || kind == U32 || kind == I64 || kind == U64;
}

static void block_of_doubles(const job *j, const void *raw, int64_t n, part *out,
                             exponent_counts *counts)
{
    double decoded[BLOCK];
    const stored_double *x = decode_double(j->kind, raw, n, decoded);
    reduce_double(x, n, j->scale, j->origin, out);
    if (counts && (j->kind == I64 || j->kind == U64))
        exponents_integer(j->kind, raw, n, counts);
    else if (counts)
        exponents_double(x, n, counts);
}

static void block_of_floats(const job *j, const void *raw, int64_t n, part *out,
                            exponent_counts *counts)
{
    float decoded[BLOCK];
    const stored_float *x = decode_float(j->kind, raw, n, decoded);
    reduce_float(x, n, 1.0, j->origin, out);
    if (counts)
        exponents_float(x, n, counts);
}

static void add_exponents(const job *j, const exponent_counts *counts)
{
    if (is_double(j->kind))
        add_exponents_double(counts, j->exponents);
    else
        add_exponents_float(counts, j->exponents);
    for (int i = 0; i < EXPONENTS; i++)
        if (counts->powers[i])
            __atomic_fetch_add(&j->exponents[i], counts->powers[i], __ATOMIC_RELAXED);
}

static void reduce_values(const job *j, int64_t start, int64_t stop, part *out)
{
    char buffer[BLOCK * 8];
    exponent_counts counts;
    exponent_counts *wanted = j->exponents ? &counts : NULL;
    if (wanted)
        memset(&counts, 0, sizeof counts);
    *out = NOTHING;
    for (; start < stop; start += BLOCK) {
        const int64_t n = stop - start < BLOCK ? stop - start : BLOCK;
        const void *raw = fetch(&j->w, start, n, buffer);
        part block;
        if (is_double(j->kind))
            block_of_doubles(j, raw, n, &block, wanted);
        else
            block_of_floats(j, raw, n, &block, wanted);
        merge(out, &block);
    }
    if (wanted)
        add_exponents(j, &counts);
}

/* Eight tables: a counter raised twice in a row would wait for its own store. */
static void count_codes(const job *j, int64_t start, int64_t stop)
{
    char buffer[BLOCK];
    uint32_t seen[8][256] = {{0}};
    for (; start < stop; start += BLOCK) {
        const int64_t n = stop - start < BLOCK ? stop - start : BLOCK;
        const uint8_t *x = fetch(&j->w, start, n, buffer);
        int64_t i = 0;
        for (; i + 8 <= n; i += 8)
            for (int t = 0; t < 8; t++)
                seen[t][x[i + t]]++;
        for (; i < n; i++)
            seen[0][x[i]]++;
    }
    for (int code = 0; code < 256; code++) {
        int64_t count = 0;
        for (int t = 0; t < 8; t++)
            count += seen[t][code];
        if (count)
            __atomic_fetch_add(&j->codes[code], count, __ATOMIC_RELAXED);
    }
}

/* Runs on every thread until no chunk is left. The default floating-point environment: a thread
 * that flushes subnormals to zero would count them as zeros. */
static void take_chunks(void *argument)
{
    job *j = argument;
    fenv_t before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    int64_t chunk;
    while ((chunk = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->chunks) {
        const int64_t start = chunk * CHUNK;
        const int64_t stop = j->w.count - start < CHUNK ? j->w.count : start + CHUNK;
        if (j->kind >= BYTE_KINDS)
            count_codes(j, start, stop);
        else
            reduce_values(j, start, stop, &j->parts[chunk]);
    }
    fesetenv(&before);
}

static double value_of(int kind, const char *at)
{
    float decoded;
    double wide;
    if (is_double(kind))
        return *decode_double(kind, at, 1, &wide);
    return *decode_float(kind, at, 1, &decoded);
}

/* A value of the tensor itself: never farther from the mean than the farthest of them. */
static double origin_of(const job *j)
{
    char buffer[8];
    const double value = value_of(j->kind, fetch(&j->w, 0, 1, buffer));
    return isfinite(value) ? value : 0.0;
}

static void run(job *j, int64_t threads)
{
    j->next = 0;
    if (threads > 1 && j->chunks > 1 && tensortap_start_threads)
        tensortap_start_threads(take_chunks, j, (unsigned)threads, 0);
    else
        take_chunks(j);
}

static part merged(const job *j)
{
    part all = NOTHING;
    for (int64_t chunk = 0; chunk < j->chunks; chunk++)
        merge(&all, &j->parts[chunk]);
    return all;
}

/* Values whose squares leave the range of float64 are reduced again in units of 2^600 or 2^-600;
 * `unit` comes out as that unit, which mean, m2 and l1 are then in. */
static part reduce(job *j, int64_t threads, double *unit)
{
    j->origin = j->w.count ? origin_of(j) : 0.0;
    run(j, threads);
    part all = merged(j);
    const double absmax = fmax(-all.lo, all.hi);
    *unit = absmax > 0x1p480 ? 0x1p600 : absmax < 0x1p-480 && absmax > 0.0 ? 0x1p-600 : 1.0;
    if (!all.count || j->kind != F64 || *unit == 1.0) {
        *unit = 1.0;
        return all;
    }
    j->scale = 1.0 / *unit;
    j->origin *= j->scale;
    j->exponents = NULL; /* counted in the first pass */
    run(j, threads);
    return merged(j);
}

static void add_code(part *all, double value, int64_t count)
{
    part some = NOTHING;
    if (!count)
        return;
    if (isfinite(value))
        some = (part){count, 0, 0, 0, value == 0 ? count : 0, value, value, value, 0.0,
                      fabs(value) * (double)count};
    some.nan = isnan(value) ? count : 0;
    some.posinf = value == INFINITY ? count : 0;
    some.neginf = value == -INFINITY ? count : 0;
    merge(all, &some);
}

static part reduce_codes(job *j, int64_t threads)
{
    int64_t codes[256] = {0}, nibbles[16] = {0};
    part all = NOTHING;
    j->codes = codes;
    run(j, threads);
    for (int code = 0; code < 256; code++) {
        nibbles[code & 15] += codes[code];
        nibbles[code >> 4] += codes[code];
    }
    const int64_t *counts = j->kind == FP4 ? nibbles : codes;
    const double *values = tables[j->kind - BYTE_KINDS];
    for (int code = 0; code < (j->kind == FP4 ? 16 : 256); code++) {
        add_code(&all, values[code], counts[code]);
        if (j->exponents && counts[code] && isfinite(values[code]) && values[code] != 0)
            j->exponents[ilogb(values[code]) - EXPONENT_MIN] += counts[code];
    }
    return all;
}

/* The leading values in logical order, which storage order need not be. */
static void lead(const job *j, int64_t count, int64_t axes, const int64_t *dims, double *first)
{
    const int packed = j->kind == FP4;
    for (int64_t k = 0; k < LEADING && k < count * (packed ? 2 : 1); k++) {
        int64_t place = packed ? k / 2 : k, offset = dims ? 0 : place;
        for (int64_t axis = axes - 1; dims && axis >= 0; axis--) {
            offset += place % dims[axis] * dims[axes + axis];
            place /= dims[axis];
        }
        const char *at = j->w.data + offset * j->w.item;
        if (j->kind < BYTE_KINDS)
            first[k] = value_of(j->kind, at);
        else
            first[k] = tables[j->kind - BYTE_KINDS]
                             [packed ? (k & 1 ? *(const uint8_t *)at >> 4 : *at & 15)
                                     : *(const uint8_t *)at];
        if (!(j->w.flags & NEGATE) != !(j->w.flags & CONJUGATE && k & 1))
            first[k] = -first[k];
    }
}

/* Moments of `times` copies of the values, in units of `unit`, as the statistics to report. */
static void report(const part *all, double origin, int64_t times, double unit, result *out)
{
    const double repeat = (double)times, n = (double)all->count * repeat;
    const double mean = origin + all->mean;
    out->count = (all->count + all->nan + all->posinf + all->neginf) * times;
    out->nan = all->nan * times;
    out->posinf = all->posinf * times;
    out->neginf = all->neginf * times;
    out->zero = all->zero * times;
    if (!all->count)
        return;
    out->min = all->lo + 0.0; /* -0.0 and 0.0 are equal: which one wins would be chance */
    out->max = all->hi + 0.0;
    out->absmax = fmax(fabs(all->lo), fabs(all->hi));
    const double squares = (all->m2 + mean * mean * (double)all->count) * repeat;
    out->mean = mean * unit;
    out->std = sqrt(all->m2 * repeat / n) * unit;
    out->rms = sqrt(squares / n) * unit;
    out->l1 = all->l1 * repeat * unit;
    out->l2 = sqrt(squares) * unit;
}

/* Reduce `count` elements of `kind`; `exponents`, if not NULL, has EXPONENTS zeros to count in.
 * Returns 0, or -1 when there is no memory for the chunks' moments. */
int64_t tensortap_statistics(const void *data, int64_t kind, int64_t count, int64_t axes,
                             const int64_t *dims, int64_t flags, int64_t threads, result *out,
                             int64_t *exponents)
{
    part few[64], *parts = few;
    const walk w = plan(data, item_size((int)kind), count, flags, axes, dims);
    job j = {.w = w, .kind = (int)kind, .scale = 1.0, .exponents = exponents};
    j.chunks = (w.count + CHUNK - 1) / CHUNK;
    if (j.chunks > 64 && kind < BYTE_KINDS && !(parts = malloc((size_t)j.chunks * sizeof *parts)))
        return -1;
    j.parts = parts;
    double unit = 1.0;
    fenv_t before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    const part all = kind < BYTE_KINDS ? reduce(&j, threads, &unit) : reduce_codes(&j, threads);
    memset(out, 0, sizeof *out);
    report(&all, j.origin, w.repeat, unit, out);
    lead(&j, count, axes, dims, out->first);
    for (int i = 0; exponents && w.repeat > 1 && i < EXPONENTS; i++)
        exponents[i] *= w.repeat;
    fesetenv(&before);
    if (parts != few)
        free(parts);
    return 0;
}
