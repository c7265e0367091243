/* Rounding float32 or bfloat16 to a number format in one pass, as values or as codes; and back.
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

/* The grid of an element, and where a block's scale comes from; `Grid` in rounding.py. */
typedef struct {
    int32_t block, power_of_two; /* else NVFP4 */
    int32_t emin, mantissa, emax, sign; /* the last: the place of a code's sign bit */
    float max, tensor_scale, tensor_inverse; /* the last two of NVFP4 */
} grid;

/* The same as bit patterns of float32. */
typedef struct {
    int32_t least, shift, most, drop, sign;
} limits;

/* Of one block: what its values are multiplied by before and after rounding, the scale's own code,
 * and a mask that makes the codes of a block without a scale 0. */
typedef struct {
    float before, after;
    int32_t code, keep;
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

static inline limits limits_of(int32_t emin, int32_t mantissa, float max, int32_t sign)
{
    return (limits){(emin + 127) << 23, (23 - mantissa) << 23, as_bits(max), 23 - mantissa, sign};
}

static inline limits limits_of_grid(const grid *g)
{
    return limits_of(g->emin, g->mantissa, g->max, g->sign);
}

/* Saturating as an integer also turns NaN into a number; the scale of its block is NaN. */
static inline int32_t saturated(int32_t bits, limits l)
{
    const int32_t magnitude = bits & MAGNITUDE;
    return magnitude < l.most ? magnitude : l.most;
}

/* A power of two whose last place is the grid's spacing at `magnitude`: adding and subtracting it
 * makes the processor round, to nearest, ties to even. */
static inline int32_t anchor(int32_t magnitude, limits l)
{
    const int32_t power = magnitude & EXPONENT;
    return (power > l.least ? power : l.least) + l.shift;
}

static inline float round_magnitude(int32_t bits, limits l)
{
    const int32_t magnitude = saturated(bits, l);
    const float large = as_float(anchor(magnitude, l));
    return (as_float(magnitude) + large) - large;
}

/* The code of what `round_magnitude` gives: the steps to it in its binade, and those before. */
static inline int32_t code_of(int32_t bits, limits l)
{
    const int32_t magnitude = saturated(bits, l), large = anchor(magnitude, l);
    const int32_t steps = as_bits(as_float(magnitude) + as_float(large)) - large;
    return (((large - l.shift - l.least) >> l.drop) + steps) | (bits < 0) << l.sign;
}

static inline int32_t value_in(int32_t x, scales s, limits l)
{
    const int32_t bits = as_bits(as_float(x) * s.before);
    return as_bits(round_magnitude(bits, l) * s.after) | (bits & SIGN);
}

static inline uint8_t code_in(int32_t x, scales s, limits l)
{
    return (uint8_t)(code_of(as_bits(as_float(x) * s.before), l) & s.keep);
}

/* 2^(biased - 127) for 0 .. 254; NaN for 255. */
static inline float power_of_two(int32_t biased)
{
    return as_float(biased << 23 | (biased == 0 || biased == 255) << 22);
}

/* The scale of a block from the bits of its largest magnitude. */
static inline scales scales_of(const grid *g, int32_t largest)
{
    const int32_t finite = largest < EXPONENT;
    if (g->power_of_two) {
        int32_t biased = (largest >> 23) - g->emax;
        biased = biased > 0 ? biased : 0;
        biased = finite ? biased : 255;
        return (scales){finite ? power_of_two(254 - biased) : 0.0f, power_of_two(biased), biased,
                        -finite};
    }
    const limits l = limits_of(-6, 3, 448.0f, 7);
    float wanted = as_float(largest) / 6.0f / g->tensor_scale;
    wanted = wanted <= 448.0f ? wanted : 448.0f;
    wanted = wanted >= 0x1p-6f ? wanted : 0x1p-6f;
    const float scale = round_magnitude(as_bits(wanted), l);
    return (scales){g->tensor_inverse / scale, g->tensor_scale * scale,
                    code_of(as_bits(wanted), l), -(g->tensor_scale == g->tensor_scale)};
}

/* Where results go: values, or if `codes` is set codes and scales. */
typedef struct {
    stored_float *values;
    uint8_t *codes, *scales;
} results;

static inline void round_block(const grid *g, const stored_float *x, results to, int64_t n)
{
    const limits l = limits_of_grid(g);
    int32_t largest = 0;
    _Pragma("omp simd reduction(max:largest)")
    for (int64_t i = 0; i < n; i++) {
        const int32_t magnitude = x[i] & MAGNITUDE;
        largest = magnitude > largest ? magnitude : largest;
    }
    const scales s = scales_of(g, largest);
    if (to.codes) {
        *to.scales = (uint8_t)s.code;
        _Pragma("omp simd")
        for (int64_t i = 0; i < n; i++)
            to.codes[i] = code_in(x[i], s, l);
        return;
    }
    _Pragma("omp simd")
    for (int64_t i = 0; i < n; i++)
        to.values[i] = value_in(x[i], s, l);
}

static inline results further(results to, int64_t values, int64_t blocks)
{
    if (to.codes)
        return (results){NULL, to.codes + values, to.scales + blocks};
    return (results){to.values + values, NULL, NULL};
}

/* `n` values side by side, from the beginning of a block on; known lengths become straight code. */
CLONES static void round_row(const grid *g, const stored_float *x, results to, int64_t n)
{
    int64_t i = 0, block = 0;
    if (g->block == 32)
        for (; i + 32 <= n; i += 32)
            round_block(g, x + i, further(to, i, block++), 32);
    else if (g->block == 16)
        for (; i + 16 <= n; i += 16)
            round_block(g, x + i, further(to, i, block++), 16);
    for (; i < n; i += g->block)
        round_block(g, x + i, further(to, i, block++), n - i < g->block ? n - i : g->block);
}

CLONES static void largest_of_columns(const stored_float *x, int64_t rows, int64_t n, int64_t step,
                                      int32_t *largest)
{
    for (int64_t row = 0; row < rows; row++)
        _Pragma("omp simd")
        for (int64_t i = 0; i < n; i++) {
            const int32_t magnitude = x[row * step + i] & MAGNITUDE;
            largest[i] = magnitude > largest[i] ? magnitude : largest[i];
        }
}

/* One block in each of `n` columns: its `rows` values are `from` apart, their results `step`. */
CLONES static void round_columns(const grid *g, const stored_float *x, results to, int64_t rows,
                                 int64_t n, int64_t from, int64_t step)
{
    const limits l = limits_of_grid(g);
    int32_t largest[TILE] = {0}, keep[TILE];
    float before[TILE], after[TILE];
    largest_of_columns(x, rows, n, from, largest);
    for (int64_t i = 0; i < n; i++) {
        const scales s = scales_of(g, largest[i]);
        before[i] = s.before;
        after[i] = s.after;
        keep[i] = s.keep;
        if (to.codes)
            to.scales[i] = (uint8_t)s.code;
    }
    for (int64_t row = 0; row < rows; row++)
        if (to.codes) {
            _Pragma("omp simd")
            for (int64_t i = 0; i < n; i++)
                to.codes[row * step + i] =
                    code_in(x[row * from + i], (scales){before[i], after[i], 0, keep[i]}, l);
        } else {
            _Pragma("omp simd")
            for (int64_t i = 0; i < n; i++)
                to.values[row * step + i] =
                    value_in(x[row * from + i], (scales){before[i], after[i], 0, 0}, l);
        }
}

/* HiFloat8 keeps 3, 2, 1 or 0 bits of mantissa. Ties go away from zero; -0.0 and what is below
 * half of 2^-22 become 0.0. `top` and `nan` are what overflow and NaN become. */
static inline int32_t hifloat8_value(int32_t x, int32_t top, int32_t nan)
{
    const int32_t magnitude = x & MAGNITUDE;
    const int32_t bounded = magnitude < 143 << 23 ? magnitude : 143 << 23;
    int32_t size = (bounded >> 23) - 127;
    size = size < 0 ? -size : size;
    const int32_t drop = 20 + (size > 3) + (size > 7) + (size > 15);
    int32_t rounded = ((bounded + (1 << (drop - 1))) >> drop) << drop;
    rounded = rounded > 105 << 23 ? rounded : 105 << 23;
    rounded = magnitude < 104 << 23 ? 0 : rounded;
    rounded = rounded > 142 << 23 ? top : rounded;
    rounded = magnitude > EXPONENT ? nan : rounded;
    return rounded ? rounded | (x & SIGN) : 0;
}

/* The code of a value on the grid; the fields are explained in formats/hifloat8_codes.py. */
static inline uint8_t hifloat8_code(int32_t value)
{
    const int32_t magnitude = value & MAGNITUDE;
    const int32_t exponent = (magnitude >> 23) - 127, mantissa = magnitude >> 20 & 7;
    const int32_t size = exponent < 0 ? -exponent : exponent;
    const int32_t width = (size >= 1) + (size >= 2) + (size >= 4) + (size >= 8);
    const int32_t places = 3 - (width > 2) - (width > 3), leading = (1 << width) >> 1;
    const int32_t field = (exponent < 0 ? leading : 0) + size - leading;
    int32_t code = (width == 4 ? 0x60 : 8 << width) | field << places | mantissa >> (3 - places);
    code = exponent < -15 ? exponent + 23 : code;
    code = magnitude == 0 ? 0 : code;
    code = magnitude == EXPONENT ? 0x6F : code;
    code |= (int32_t)((uint32_t)value >> 24) & 0x80;
    return (uint8_t)(magnitude > EXPONENT ? 0x80 : code);
}

CLONES static void round_hifloat8(const stored_float *x, results to, int64_t n, int32_t top,
                                  int32_t nan)
{
    if (to.codes) {
        _Pragma("omp simd")
        for (int64_t i = 0; i < n; i++)
            to.codes[i] = hifloat8_code(hifloat8_value(x[i], top, nan));
        return;
    }
    _Pragma("omp simd")
    for (int64_t i = 0; i < n; i++)
        to.values[i] = hifloat8_value(x[i], top, nan);
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

/* A dense tensor of outer x length x inner values; `g` NULL: HiFloat8, all in one row. Either
 * `to` (values, as wide as those of `from`) or `codes` is set. */
typedef struct {
    const char *from;
    char *to;
    uint8_t *codes, *scales;
    int64_t item, outer, length, inner;
    const grid *g;
    int32_t top, nan;
    int64_t tasks, next, batch;
} job;

/* Where the results of value `at` and block `block` go; of values that are to be narrowed, into
 * `buffer` first. */
static results place(const job *j, int64_t at, int64_t block, stored_float *buffer)
{
    if (j->codes)
        return (results){NULL, j->codes + at, j->scales + block};
    return (results){j->item == 4 ? (stored_float *)j->to + at : buffer, NULL, NULL};
}

static void piece_of_row(const job *j, const stored_float *x, results to, int64_t n)
{
    if (j->g)
        round_row(j->g, x, to, n);
    else
        round_hifloat8(x, to, n, j->top, j->nan);
}

static void stretch_of_row(const job *j, int64_t at, int64_t block, int64_t n)
{
    if (j->item == 4) {
        piece_of_row(j, (const stored_float *)j->from + at, place(j, at, block, NULL), n);
        return;
    }
    stored_float buffer[PIECE];
    for (int64_t i = 0; i < n; i += PIECE) {
        const int64_t some = n - i < PIECE ? n - i : PIECE;
        widen((const stored_bfloat *)j->from + at + i, buffer, some);
        const int64_t blocks = j->g ? i / j->g->block : 0;
        piece_of_row(j, buffer, place(j, at + i, block + blocks, buffer), some);
        if (!j->codes)
            narrow(buffer, (stored_bfloat *)j->to + at + i, some);
    }
}

static void row_task(const job *j, int64_t task)
{
    const int64_t stretches = (j->length + TASK - 1) / TASK;
    const int64_t row = task / stretches, start = task % stretches * TASK;
    const int64_t n = j->length - start < TASK ? j->length - start : TASK;
    const int64_t block = j->g ? j->g->block : TASK, bands = (j->length + block - 1) / block;
    stretch_of_row(j, row * j->length + start, row * bands + start / block, n);
}

static void tile(const job *j, int64_t at, int64_t block, int64_t rows, int64_t n)
{
    if (j->item == 4) {
        round_columns(j->g, (const stored_float *)j->from + at, place(j, at, block, NULL), rows, n,
                      j->inner, j->inner);
        return;
    }
    stored_float buffer[LONGEST_BLOCK * TILE];
    for (int64_t row = 0; row < rows; row++)
        widen((const stored_bfloat *)j->from + at + row * j->inner, buffer + row * TILE, n);
    round_columns(j->g, buffer, place(j, at, block, buffer), rows, n, TILE,
                  j->codes ? j->inner : TILE);
    for (int64_t row = 0; row < rows && !j->codes; row++)
        narrow(buffer + row * TILE, (stored_bfloat *)j->to + at + row * j->inner, n);
}

static void column_task(const job *j, int64_t task)
{
    const int64_t block = j->g->block, bands = (j->length + block - 1) / block;
    const int64_t tiles = (j->inner + TILE - 1) / TILE;
    const int64_t column = task % tiles * TILE, band = task / tiles, row = band % bands * block;
    const int64_t rows = j->length - row < block ? j->length - row : block;
    const int64_t n = j->inner - column < TILE ? j->inner - column : TILE;
    const int64_t at = (band / bands * j->length + row) * j->inner + column;
    tile(j, at, band * j->inner + column, rows, n);
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

static void run(void (*work)(void *), void *argument, int64_t threads)
{
    if (threads > 1 && tensortap_start_threads)
        tensortap_start_threads(work, argument, (unsigned)threads, 0);
    else
        work(argument);
}

/* Round blocks along the middle axis of a dense outer x length x inner tensor, `item` 4 (float32)
 * or 2 (bfloat16) bytes a value. Values go to `to`, in the same layout, or if `codes` is not NULL
 * codes go there and the scales of outer x blocks x inner to `scale_codes`. Blocks of up to 32. */
void tensortap_round_blocks(const void *from, void *to, uint8_t *codes, uint8_t *scale_codes,
                            int64_t item, int64_t outer, int64_t length, int64_t inner,
                            const grid *g, int64_t threads)
{
    if (inner == 1 && length % g->block == 0) {
        length *= outer;
        outer = 1;
    }
    job j = {.from = from, .to = to, .codes = codes, .scales = scale_codes, .item = item,
             .outer = outer, .length = length, .inner = inner, .g = g};
    const int64_t bands = (length + g->block - 1) / g->block;
    if (inner == 1) {
        j.tasks = outer * ((length + TASK - 1) / TASK);
        j.batch = length ? 1 + TASK / length / 2 : 1;
    } else {
        j.tasks = outer * bands * ((inner + TILE - 1) / TILE);
        j.batch = 1 + TILE / (inner + 1);
    }
    run(take_tasks, &j, threads);
}

/* Round `count` values side by side to HiFloat8, as values or as codes. `saturate`: overflow
 * becomes the largest value and NaN 0. */
void tensortap_round_hifloat8(const void *from, void *to, uint8_t *codes, int64_t item,
                              int64_t count, int64_t saturate, int64_t threads)
{
    job j = {.from = from, .to = to, .codes = codes, .item = item, .outer = 1, .length = count,
             .inner = 1, .top = saturate ? 142 << 23 : EXPONENT, .nan = saturate ? 0 : QUIET_NAN,
             .tasks = (count + TASK - 1) / TASK, .batch = 1};
    run(take_tasks, &j, threads);
}

/* Codes of outer x length x inner elements, the values of the 256 codes, and float scales of
 * outer x blocks x inner, or NULL. */
typedef struct {
    const uint8_t *codes;
    const float *table, *scales;
    float *to;
    int64_t length, inner, block, rows, next;
} decoding;

CLONES static void decode_run(const uint8_t *codes, const float *table, float scale, float *to,
                              int64_t n)
{
    _Pragma("omp simd")
    for (int64_t i = 0; i < n; i++)
        to[i] = table[codes[i]] * scale;
}

CLONES static void decode_columns(const uint8_t *codes, const float *table, const float *scales,
                                  float *to, int64_t n)
{
    _Pragma("omp simd")
    for (int64_t i = 0; i < n; i++)
        to[i] = table[codes[i]] * scales[i];
}

/* One index of outer and length: `inner` values. */
static void decode_row(const decoding *d, int64_t row)
{
    const int64_t at = row * d->inner, bands = (d->length + d->block - 1) / d->block;
    const int64_t band = row / d->length * bands + row % d->length / d->block;
    decode_columns(d->codes + at, d->table, d->scales + band * d->inner, d->to + at, d->inner);
}

/* One block where the blocked axis is the last. */
static void decode_block(const decoding *d, int64_t block)
{
    const int64_t bands = (d->length + d->block - 1) / d->block, start = block % bands * d->block;
    const int64_t at = block / bands * d->length + start;
    const int64_t n = d->length - start < d->block ? d->length - start : d->block;
    decode_run(d->codes + at, d->table, d->scales ? d->scales[block] : 1.0f, d->to + at, n);
}

static void take_rows(void *argument)
{
    decoding *d = argument;
    const int64_t size = d->inner == 1 ? d->block : d->inner, batch = 1 + TASK / (size + 1);
    fenv_t before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    int64_t first;
    while ((first = __atomic_fetch_add(&d->next, batch, __ATOMIC_RELAXED)) < d->rows)
        for (int64_t row = first; row < first + batch && row < d->rows; row++)
            if (d->inner == 1)
                decode_block(d, row);
            else
                decode_row(d, row);
    fesetenv(&before);
}

/* The float32 values of codes, dense outer x length x inner as in `tensortap_round_blocks`; for
 * codes without scales `block` may be any length. */
void tensortap_decode(const uint8_t *codes, const float *table, const float *scale_values,
                      float *to, int64_t outer, int64_t length, int64_t inner, int64_t block,
                      int64_t threads)
{
    decoding d = {.codes = codes, .table = table, .scales = scale_values, .to = to,
                  .length = length, .inner = inner, .block = block};
    d.rows = outer * (inner == 1 ? (length + block - 1) / block : length);
    run(take_rows, &d, threads);
}
