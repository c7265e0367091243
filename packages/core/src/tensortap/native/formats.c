/* Rounding to number formats and back, in one pass over float32 or bfloat16.
 *
 * Blocks of an MX format or of NVFP4 (source: OCP Microscaling Formats v1.0, section 6.3) and
 * HiFloat8 with ties away from zero. What torch operations give, bit for bit: tests compare them.
 */
#include <fenv.h>
#include <stdint.h>
#include <string.h>

#include "clones.h"
#include "threads.h"

#define SIGN ((int32_t)0x80000000)
#define MAGNITUDE 0x7FFFFFFF
#define EXPONENT 0x7F800000
#define QUIET_NAN 0x7FC00000
/* Values: of a piece that is converted at once, of a task, and columns of a tile (64 KiB by 32). */
#define PIECE 1024
#define TASK (16 * PIECE)
#define TILE 256
#define LONGEST_BLOCK 32

typedef int32_t __attribute__((may_alias)) stored_float;
typedef uint16_t __attribute__((may_alias)) stored_bfloat;

/* The grid of an element, and where a block's scale comes from; `Grid` in binding_formats.py. */
typedef struct {
    int32_t block, power_of_two; /* else NVFP4 */
    int32_t emin, mantissa, emax;
    float max, tensor_scale, tensor_inverse; /* the last two of NVFP4 */
} grid;

/* Of one block: what its values are multiplied by before and after rounding. */
typedef struct {
    float before, after;
} scales;

static inline float as_float(int32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline int32_t as_bits(float value)
{
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Nearest magnitude on the grid, ties to even, saturated: adding and subtracting a power of two
 * whose last place is the grid's spacing makes the processor round. Saturating as an integer also
 * turns NaN into a number; the scale of its block is NaN. */
static inline float round_magnitude(int32_t bits, int32_t least, int32_t shift, int32_t most)
{
    int32_t magnitude = bits & MAGNITUDE;
    magnitude = magnitude < most ? magnitude : most;
    int32_t power = magnitude & EXPONENT;
    power = power > least ? power : least;
    const float large = as_float(power + shift);
    return (as_float(magnitude) + large) - large;
}

static inline int32_t round_scaled(int32_t x, scales s, int32_t least, int32_t shift, int32_t most)
{
    const int32_t bits = as_bits(as_float(x) * s.before);
    return as_bits(round_magnitude(bits, least, shift, most) * s.after) | (bits & SIGN);
}

/* 2^(biased - 127) for 0 .. 254. */
static inline float power_of_two(int32_t biased)
{
    return as_float(biased ? biased << 23 : 1 << 22);
}

static inline scales scales_of(const grid *g, int32_t largest)
{
    if (largest >= EXPONENT)
        return (scales){0.0f, as_float(QUIET_NAN)};
    if (g->power_of_two) {
        int32_t biased = (largest >> 23) - g->emax;
        biased = biased > 0 ? biased : 0;
        return (scales){power_of_two(254 - biased), power_of_two(biased)};
    }
    float wanted = as_float(largest) / 6.0f / g->tensor_scale;
    wanted = wanted > 0x1p-6f ? wanted : 0x1p-6f;
    const float scale = round_magnitude(as_bits(wanted), 121 << 23, 20 << 23, as_bits(448.0f));
    return (scales){g->tensor_inverse / scale, g->tensor_scale * scale};
}

static inline void round_block(const grid *g, const stored_float *x, stored_float *y, int64_t n)
{
    const int32_t least = (g->emin + 127) << 23, shift = (23 - g->mantissa) << 23;
    const int32_t most = as_bits(g->max);
    int32_t largest = 0;
    _Pragma("omp simd reduction(max:largest)")
    for (int64_t i = 0; i < n; i++) {
        const int32_t magnitude = x[i] & MAGNITUDE;
        largest = magnitude > largest ? magnitude : largest;
    }
    const scales s = scales_of(g, largest);
    _Pragma("omp simd")
    for (int64_t i = 0; i < n; i++)
        y[i] = round_scaled(x[i], s, least, shift, most);
}

/* `n` values side by side, from the beginning of a block on; known lengths become straight code. */
CLONES static void round_row(const grid *g, const stored_float *x, stored_float *y, int64_t n)
{
    int64_t i = 0;
    if (g->block == 32)
        for (; i + 32 <= n; i += 32)
            round_block(g, x + i, y + i, 32);
    else if (g->block == 16)
        for (; i + 16 <= n; i += 16)
            round_block(g, x + i, y + i, 16);
    for (; i < n; i += g->block)
        round_block(g, x + i, y + i, n - i < g->block ? n - i : g->block);
}

/* One block in each of `n` columns, its `rows` values `step` apart. */
CLONES static void round_columns(const grid *g, const stored_float *x, stored_float *y,
                                 int64_t rows, int64_t n, int64_t from, int64_t to)
{
    const int32_t least = (g->emin + 127) << 23, shift = (23 - g->mantissa) << 23;
    const int32_t most = as_bits(g->max);
    int32_t largest[TILE] = {0};
    float before[TILE], after[TILE];
    for (int64_t row = 0; row < rows; row++)
        _Pragma("omp simd")
        for (int64_t i = 0; i < n; i++) {
            const int32_t magnitude = x[row * from + i] & MAGNITUDE;
            largest[i] = magnitude > largest[i] ? magnitude : largest[i];
        }
    for (int64_t i = 0; i < n; i++) {
        const scales s = scales_of(g, largest[i]);
        before[i] = s.before;
        after[i] = s.after;
    }
    for (int64_t row = 0; row < rows; row++)
        _Pragma("omp simd")
        for (int64_t i = 0; i < n; i++)
            y[row * to + i] = round_scaled(x[row * from + i], (scales){before[i], after[i]},
                                           least, shift, most);
}

/* Ties away from zero; 3, 2, 1 or 0 bits of mantissa are kept. -0.0 and what is below half of
 * 2^-22 become 0.0. `top` and `nan` are what overflow and NaN become. */
CLONES static void round_hifloat8(const stored_float *x, stored_float *y, int64_t n, int32_t top,
                                  int32_t nan)
{
    _Pragma("omp simd")
    for (int64_t i = 0; i < n; i++) {
        const int32_t magnitude = x[i] & MAGNITUDE;
        const int32_t bounded = magnitude < 143 << 23 ? magnitude : 143 << 23;
        int32_t size = (bounded >> 23) - 127;
        size = size < 0 ? -size : size;
        const int32_t drop = 20 + (size > 3) + (size > 7) + (size > 15);
        int32_t rounded = ((bounded + (1 << (drop - 1))) >> drop) << drop;
        rounded = rounded > 105 << 23 ? rounded : 105 << 23;
        rounded = magnitude < 104 << 23 ? 0 : rounded;
        rounded = rounded > 142 << 23 ? top : rounded;
        rounded = magnitude > EXPONENT ? nan : rounded;
        y[i] = rounded ? rounded | (x[i] & SIGN) : 0;
    }
}

CLONES static void widen(const stored_bfloat *x, stored_float *y, int64_t n)
{
    _Pragma("omp simd")
    for (int64_t i = 0; i < n; i++)
        y[i] = (int32_t)((uint32_t)x[i] << 16);
}

/* To nearest, ties to even; the only NaN here has room above it to be rounded. */
CLONES static void narrow(const stored_float *x, stored_bfloat *y, int64_t n)
{
    _Pragma("omp simd")
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = (uint32_t)x[i];
        y[i] = (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }
}

/* A dense tensor of outer x length x inner values; `grid` NULL: HiFloat8, all in one row. */
typedef struct {
    const char *from;
    char *to;
    int64_t item, outer, length, inner;
    const grid *g;
    int32_t top, nan;
    int64_t tasks, next, batch;
} job;

static void piece_of_row(const job *j, const stored_float *x, stored_float *y, int64_t n)
{
    if (j->g)
        round_row(j->g, x, y, n);
    else
        round_hifloat8(x, y, n, j->top, j->nan);
}

static void stretch_of_row(const job *j, int64_t at, int64_t n)
{
    stored_float buffer[PIECE];
    const char *from = j->from + at * j->item;
    char *to = j->to + at * j->item;
    if (j->item == 4) {
        piece_of_row(j, (const stored_float *)from, (stored_float *)to, n);
        return;
    }
    for (int64_t i = 0; i < n; i += PIECE) {
        const int64_t some = n - i < PIECE ? n - i : PIECE;
        widen((const stored_bfloat *)from + i, buffer, some);
        piece_of_row(j, buffer, buffer, some);
        narrow(buffer, (stored_bfloat *)to + i, some);
    }
}

static void row_task(const job *j, int64_t task)
{
    const int64_t stretches = (j->length + TASK - 1) / TASK;
    const int64_t row = task / stretches, start = task % stretches * TASK;
    const int64_t n = j->length - start < TASK ? j->length - start : TASK;
    stretch_of_row(j, row * j->length + start, n);
}

static void tile(const job *j, int64_t at, int64_t rows, int64_t n)
{
    stored_float buffer[LONGEST_BLOCK * TILE];
    const char *from = j->from + at * j->item;
    char *to = j->to + at * j->item;
    if (j->item == 4) {
        round_columns(j->g, (const stored_float *)from, (stored_float *)to, rows, n, j->inner,
                      j->inner);
        return;
    }
    for (int64_t row = 0; row < rows; row++)
        widen((const stored_bfloat *)from + row * j->inner, buffer + row * TILE, n);
    round_columns(j->g, buffer, buffer, rows, n, TILE, TILE);
    for (int64_t row = 0; row < rows; row++)
        narrow(buffer + row * TILE, (stored_bfloat *)to + row * j->inner, n);
}

static void column_task(const job *j, int64_t task)
{
    const int64_t block = j->g->block, bands = (j->length + block - 1) / block;
    const int64_t tiles = (j->inner + TILE - 1) / TILE;
    const int64_t column = task % tiles * TILE, row = task / tiles % bands * block;
    const int64_t rows = j->length - row < block ? j->length - row : block;
    const int64_t n = j->inner - column < TILE ? j->inner - column : TILE;
    tile(j, (task / tiles / bands * j->length + row) * j->inner + column, rows, n);
}

/* Runs on every thread until no task is left. The default floating-point environment: a thread
 * that flushes subnormals to zero has no scale of 2^-127. */
static void take_tasks(void *argument)
{
    job *j = argument;
    fenv_t before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    int64_t first;
    while ((first = __atomic_fetch_add(&j->next, j->batch, __ATOMIC_RELAXED)) < j->tasks)
        for (int64_t task = first; task < first + j->batch && task < j->tasks; task++)
            if (j->inner == 1)
                row_task(j, task);
            else
                column_task(j, task);
    fesetenv(&before);
}

static void run(job *j, int64_t threads)
{
    if (threads > 1 && j->tasks > j->batch && tensortap_start_threads)
        tensortap_start_threads(take_tasks, j, (unsigned)threads, 0);
    else
        take_tasks(j);
}

/* Round blocks along the middle axis of a dense outer x length x inner tensor, `item` 4 (float32)
 * or 2 (bfloat16) bytes a value; `to` has the same layout. Blocks of up to 32. */
void tensortap_round_blocks(const void *from, void *to, int64_t item, int64_t outer,
                            int64_t length, int64_t inner, const grid *g, int64_t threads)
{
    if (inner == 1 && length % g->block == 0) {
        length *= outer;
        outer = 1;
    }
    job j = {.from = from, .to = to, .item = item, .outer = outer, .length = length,
             .inner = inner, .g = g};
    const int64_t bands = (length + g->block - 1) / g->block;
    if (inner == 1) {
        j.tasks = outer * ((length + TASK - 1) / TASK);
        j.batch = length ? 1 + TASK / length / 2 : 1;
    } else {
        j.tasks = outer * bands * ((inner + TILE - 1) / TILE);
        j.batch = 1 + TILE / (inner + 1);
    }
    run(&j, threads);
}

/* Round `count` values side by side to HiFloat8; `saturate`: see `round_hifloat8`. */
void tensortap_round_hifloat8(const void *from, void *to, int64_t item, int64_t count,
                              int64_t saturate, int64_t threads)
{
    job j = {.from = from, .to = to, .item = item, .outer = 1, .length = count, .inner = 1,
             .top = saturate ? 142 << 23 : EXPONENT, .nan = saturate ? 0 : QUIET_NAN,
             .tasks = (count + TASK - 1) / TASK, .batch = 1};
    run(&j, threads);
}
