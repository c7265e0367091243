/* The values of codes, by table. */
#include "clones.h"
#include "tasks.h"

/* Codes of outer x length x inner elements, the values of the 256 codes, and float scales of
 * outer x blocks x inner, or NULL. */
typedef struct {
    const uint8_t *codes;
    const float *table, *scales;
    float *to;
    int64_t length, inner, block;
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

static void do_row(void *argument, int64_t row)
{
    const decoding *d = argument;
    if (d->inner == 1)
        decode_block(d, row);
    else
        decode_row(d, row);
}

/* The float32 values of codes, dense outer x length x inner as in `tensortap_round_blocks`; for
 * codes without scales `block` may be any length. */
void tensortap_decode(const uint8_t *codes, const float *table, const float *scale_values,
                      float *to, int64_t outer, int64_t length, int64_t inner, int64_t block,
                      int64_t threads)
{
    decoding d = {.codes = codes, .table = table, .scales = scale_values, .to = to,
                  .length = length, .inner = inner, .block = block};
    if (inner == 1)
        share(do_row, &d, outer * ((length + block - 1) / block), block, threads);
    else
        share(do_row, &d, outer * length, inner, threads);
}
