/* Rounding float32 or bfloat16 to a number format in one pass, as values or as codes; and back.
 *
 * Blocks of an MX format or of NVFP4 (source: OCP Microscaling Formats v1.0, section 6.3) and
 * HiFloat8 with ties away from zero. What torch operations give, bit for bit: tests compare them.
 */
#include "clones.h"
#include "grid.h"
#include "hifloat8.h"
#include "tasks.h"

/* Values of a piece that is converted at once, and columns of a tile. */
#define PIECE 1024
#define TILE 256
#define LONGEST_BLOCK 32

typedef int32_t __attribute__((may_alias)) stored_float;
typedef uint16_t __attribute__((may_alias)) stored_bfloat;

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
} job;

/* Where the results of value `at` and block `block` go; of values that are to be narrowed, into
 * `buffer` first. */
static results place(const job *j, int64_t at, int64_t block, stored_float *buffer)
{
    if (j->codes)
        return (results){NULL, j->codes + at, j->scales ? j->scales + block : NULL};
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

static void do_task(void *argument, int64_t task)
{
    const job *j = argument;
    if (j->inner == 1)
        row_task(j, task);
    else
        column_task(j, task);
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
    if (inner == 1)
        share(do_task, &j, outer * ((length + TASK - 1) / TASK), length, threads);
    else
        share(do_task, &j, outer * bands * ((inner + TILE - 1) / TILE), g->block * (inner < TILE ? inner : TILE),
              threads);
}

/* Round `count` values side by side to HiFloat8, as values or as codes. `saturate`: overflow
 * becomes the largest value and NaN 0. */
void tensortap_round_hifloat8(const void *from, void *to, uint8_t *codes, int64_t item,
                              int64_t count, int64_t saturate, int64_t threads)
{
    job j = {.from = from, .to = to, .codes = codes, .item = item, .outer = 1, .length = count,
             .inner = 1, .top = saturate ? 142 << 23 : EXPONENT, .nan = saturate ? 0 : QUIET_NAN};
    share(do_task, &j, (count + TASK - 1) / TASK, TASK, threads);
}

