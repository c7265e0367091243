/* Blocks of two tensors that are compared: what is read, and how it becomes float64. */
#ifndef TENSORTAP_PAIRS_H
#define TENSORTAP_PAIRS_H

#include "blocks.h"

/* Pairs of a block, even; with what is computed of them they fit in the L1 cache. */
#define PAIRS 512
/* Pairs a thread takes at once. */
#define PAIRS_TASK (64 * PAIRS)
#define MAGNITUDE_OF_DOUBLE INT64_MAX
#define EPSILON 1e-8

/* Further kinds than those of `enum kind`: any byte with a table, and two 4-bit codes a byte. */
enum { BYTE = BYTE_KINDS, NIBBLE };

/* One side of dense values; `table` has the values of codes. */
typedef struct {
    const char *data;
    int64_t kind, is_float;
    const double *table;
} side;

/* In which units sums are taken, powers of two that keep squares in range, and from where means
 * are. The difference is (other * half - ref * half) * difference. */
typedef struct {
    double ref, other, half, difference;
    double ref_origin, other_origin, difference_origin;
} frame;

DECODER(widen_float, stored_float, double, (double))
DECODER(widen_i16, stored_i16, double, (double))
DECODER(widen_u16, stored_u16, double, (double))

CLONES static void widen_bfloat16(const stored_half *restrict from, int64_t n, double *restrict to)
{
    _Pragma("omp simd")
    for (int64_t i = 0; i < n; i++)
        to[i] = (double)float_of_bfloat16(from[i]);
}

static void widen_codes(const uint8_t *from, int64_t n, const double *table, double *to)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = table[from[i]];
}

static int64_t stored_size(int64_t kind)
{
    static const int64_t sizes[] = {4, 8, 2, 2, 2, 4, 8, 2, 4, 8, 1, 1};
    return sizes[kind];
}

/* `n` stored elements from the even place `start` on; 4-bit codes are unpacked into `bytes`. */
static const char *stored_at(const side *s, int64_t start, int64_t n, uint8_t *bytes)
{
    if (s->kind != NIBBLE)
        return s->data + start * stored_size(s->kind);
    const uint8_t *packed = (const uint8_t *)s->data + start / 2;
    for (int64_t i = 0; i < n; i++)
        bytes[i] = i & 1 ? packed[i / 2] >> 4 : packed[i / 2] & 15;
    return (const char *)bytes;
}

/* Values as float64: where they lie if that is possible, else in `to`. */
static const stored_double *values_at(const side *s, const char *from, int64_t n, double *to)
{
    float narrow[PAIRS];
    const void *raw = from;
    switch (s->kind) {
    case F64: return raw;
    case F32: widen_float(raw, n, to); return to;
    case F16:
        decode_half(raw, n, narrow);
        widen_float(narrow, n, to);
        return to;
    case BF16: widen_bfloat16(raw, n, to); return to;
    case I16: widen_i16(raw, n, to); return to;
    case U16: widen_u16(raw, n, to); return to;
    case BYTE:
    case NIBBLE: widen_codes(raw, n, s->table, to); return to;
    default: return decode_double((int)s->kind, raw, n, to);
    }
}

static inline int64_t bits_of(double value)
{
    int64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Differences, and those over |ref| + 1e-8 with the sign of the difference; in half units. */
static inline double apart(double ref, double other, const frame *f)
{
    return other * f->half - ref * f->half + 0.0; /* -0.0 would be a second kind of nothing */
}

static inline double relative(double difference, double ref, const frame *f)
{
    return fabs(difference) / (fabs(ref) * f->half + EPSILON * f->half);
}

#endif
