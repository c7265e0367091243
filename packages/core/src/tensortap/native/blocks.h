/* One block of values: decode to float or double, reduce in one pass, count exponents.
 *
 * Sums are float64 and taken of x - x[0]: the shift lies among the values, so with M2 the sum of
 * squared deviations, sum (x - x[0])^2 <= (n + 1) * M2, and a large mean cannot cancel the
 * variance. Loops are plain C; `omp simd` allows the compiler to reorder these reductions only.
 */
#ifndef TENSORTAP_BLOCKS_H
#define TENSORTAP_BLOCKS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "clones.h"

#if HAVE_CLONES
#include <immintrin.h>
#define HAVE_F16C 1
#else
#define HAVE_F16C 0
#endif

/* Even, so that a block starts at a real part; two of them as float64 fit in the L1 cache. */
#define BLOCK 2048
/* Exponents of float64: from the smallest subnormal, 2^-1074, to 2^1023. */
#define EXPONENT_MIN (-1074)
#define EXPONENTS 2098

enum kind { F32, F64, F16, BF16, I16, I32, I64, U16, U32, U64, BYTE_KINDS };

/* Storage may be unaligned and is read as whatever type it holds. */
#define STORED __attribute__((aligned(1), may_alias))
typedef float STORED stored_float;
typedef double STORED stored_double;
typedef uint16_t STORED stored_half;
typedef int16_t STORED stored_i16;
typedef int32_t STORED stored_i32;
typedef int64_t STORED stored_i64;
typedef uint16_t STORED stored_u16;
typedef uint32_t STORED stored_u32;
typedef uint64_t STORED stored_u64;

/* Moments of the finite values; `count` is how many those are. `mean` is the distance from the
 * tensor's origin: means near 1e9 rounded to float64 could not tell 1e-8 between two blocks. */
typedef struct {
    int64_t count, nan, posinf, neginf, zero;
    double lo, hi, mean, m2, l1;
} part;

static const part NOTHING = {0, 0, 0, 0, 0, INFINITY, -INFINITY, 0.0, 0.0, 0.0};

static inline float float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float float_of_bfloat16(uint16_t bits)
{
    return float_of_bits((uint32_t)bits << 16);
}

/* Exponents move by 127 - 15; subnormals are normalised by subtracting their implicit bit. */
static inline float float_of_half(uint16_t bits)
{
    const uint32_t magnitude = (uint32_t)(bits & 0x7fff) << 13;
    const uint32_t exponent = magnitude & 0x0f800000u;
    uint32_t word = magnitude + (112u << 23);
    const float subnormal = float_of_bits(word + (1u << 23)) - float_of_bits(113u << 23);
    uint32_t small;
    memcpy(&small, &subnormal, sizeof small);
    word += exponent == 0x0f800000u ? 112u << 23 : 0;
    word = exponent == 0 ? small : word;
    return float_of_bits(word | (uint32_t)(bits & 0x8000) << 16);
}

#define DECODER(NAME, FROM, TO, CONVERT)                                        \
    CLONES static void NAME(const FROM *restrict from, int64_t n, TO *restrict to) \
    {                                                                           \
        _Pragma("omp simd")                                                     \
        for (int64_t i = 0; i < n; i++)                                         \
            to[i] = CONVERT(from[i]);                                           \
    }

DECODER(decode_bfloat16, stored_half, float, float_of_bfloat16)
DECODER(decode_half_bits, stored_half, float, float_of_half)
DECODER(decode_i16, stored_i16, float, (float))
DECODER(decode_u16, stored_u16, float, (float))
DECODER(decode_i32, stored_i32, double, (double))
DECODER(decode_u32, stored_u32, double, (double))
DECODER(decode_i64, stored_i64, double, (double))
DECODER(decode_u64, stored_u64, double, (double))

#if HAVE_F16C
__attribute__((target("avx2,f16c")))
static void decode_half_f16c(const stored_half *from, int64_t n, float *to)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
    for (; i < n; i++)
        to[i] = float_of_half(from[i]);
}
#endif

static void decode_half(const stored_half *from, int64_t n, float *to)
{
#if HAVE_F16C
    if (__builtin_cpu_supports("avx2")) {
        decode_half_f16c(from, n, to);
        return;
    }
#endif
    decode_half_bits(from, n, to);
}

static const stored_float *decode_float(int kind, const void *from, int64_t n, float *to)
{
    switch (kind) {
    case F16: decode_half(from, n, to); return to;
    case BF16: decode_bfloat16(from, n, to); return to;
    case I16: decode_i16(from, n, to); return to;
    case U16: decode_u16(from, n, to); return to;
    default: return from;
    }
}

static const stored_double *decode_double(int kind, const void *from, int64_t n, double *to)
{
    switch (kind) {
    case I32: decode_i32(from, n, to); return to;
    case U32: decode_u32(from, n, to); return to;
    case I64: decode_i64(from, n, to); return to;
    case U64: decode_u64(from, n, to); return to;
    default: return from;
    }
}

/* Integers in the order of the floats: compilers that honour NaN do not vectorise the minimum of
 * floats, not even where they are allowed to reorder. */
#define ORDERING(TYPE, ORDER, SIGN_BIT, MAGNITUDE)           \
    static inline ORDER order_of_##TYPE(TYPE value)          \
    {                                                        \
        ORDER bits;                                          \
        memcpy(&bits, &value, sizeof bits);                  \
        return bits ^ (bits >> SIGN_BIT & MAGNITUDE);        \
    }                                                        \
    static inline TYPE of_order_##TYPE(ORDER order)          \
    {                                                        \
        TYPE value;                                          \
        order ^= order >> SIGN_BIT & MAGNITUDE;              \
        memcpy(&value, &order, sizeof value);                \
        return value;                                        \
    }

ORDERING(float, int32_t, 31, INT32_MAX)
ORDERING(double, int64_t, 63, INT64_MAX)

#define UNSCALED(value) ((double)(value))
#define SCALED(value) ((double)(value) * scale)

/* `sums_`: the one pass, right if all values are finite; else l1 comes out NaN or infinite.
 * `finite_`: the slow path, counts the values that are not and closes the gaps they leave. */
#define REDUCTION(TYPE, STORED_TYPE, ORDER, IN_UNITS)                                              \
    CLONES static void sums_##TYPE(const STORED_TYPE *x, int64_t n, double scale, double origin, \
                                   part *out)                                               \
    {                                                                                       \
        const double shift = IN_UNITS(x[0]);                                                \
        double sum = 0.0, squares = 0.0, l1 = 0.0;                                          \
        ORDER lo = order_of_##TYPE((TYPE)INFINITY), hi = order_of_##TYPE(-(TYPE)INFINITY);  \
        int32_t zero = 0;                                                                   \
        (void)scale;                                                                        \
        _Pragma("omp simd reduction(+:sum,squares,l1,zero) reduction(min:lo) reduction(max:hi)") \
        for (int64_t i = 0; i < n; i++) {                                                   \
            const TYPE value = x[i];                                                        \
            const double delta = IN_UNITS(value) - shift;                                   \
            sum += delta;                                                                   \
            squares += delta * delta;                                                       \
            l1 += fabs(IN_UNITS(value));                                                    \
            const ORDER order = order_of_##TYPE(value);                                     \
            lo = order < lo ? order : lo;                                                   \
            hi = order > hi ? order : hi;                                                   \
            zero += value == 0;                                                             \
        }                                                                                   \
        const double m2 = squares - sum * (sum / (double)n);                                \
        *out = (part){n, 0, 0, 0, zero, of_order_##TYPE(lo), of_order_##TYPE(hi),           \
                      (shift - origin) + sum / (double)n, m2 > 0.0 ? m2 : 0.0, l1};         \
    }                                                                                       \
    static int64_t finite_##TYPE(const STORED_TYPE *x, int64_t n, TYPE *kept, part *out)     \
    {                                                                                       \
        int64_t count = 0;                                                                  \
        for (int64_t i = 0; i < n; i++) {                                                   \
            kept[count] = x[i];                                                             \
            count += isfinite(x[i]) != 0;                                                   \
            out->nan += isnan(x[i]) != 0;                                                   \
            out->posinf += x[i] == (TYPE)INFINITY;                                          \
            out->neginf += x[i] == -(TYPE)INFINITY;                                         \
        }                                                                                   \
        return count;                                                                       \
    }                                                                                       \
    static void reduce_##TYPE(const STORED_TYPE *x, int64_t n, double scale, double origin,  \
                              part *out)                                                    \
    {                                                                                       \
        sums_##TYPE(x, n, scale, origin, out);                                              \
        if (isfinite(out->l1))                                                              \
            return;                                                                         \
        TYPE kept[BLOCK];                                                                   \
        part odd = NOTHING;                                                                 \
        const int64_t count = finite_##TYPE(x, n, kept, &odd);                              \
        *out = NOTHING;                                                                     \
        if (count)                                                                          \
            sums_##TYPE(kept, count, scale, origin, out);                                   \
        out->nan = odd.nan;                                                                 \
        out->posinf = odd.posinf;                                                           \
        out->neginf = odd.neginf;                                                           \
    }

REDUCTION(float, stored_float, int32_t, UNSCALED)
REDUCTION(double, stored_double, int64_t, SCALED)

/* Adds `more` to `all` (Chan, Golub and LeVeque, 1979); the caller fixes the order. */
static void merge(part *all, const part *more)
{
    const double count = (double)(all->count + more->count);
    if (more->count) {
        const double share = (double)more->count / count, gap = more->mean - all->mean;
        all->m2 += more->m2 + gap * gap * ((double)all->count * share);
        all->mean += gap * share;
    }
    all->count += more->count;
    all->nan += more->nan;
    all->posinf += more->posinf;
    all->neginf += more->neginf;
    all->zero += more->zero;
    all->lo = more->lo < all->lo ? more->lo : all->lo;
    all->hi = more->hi > all->hi ? more->hi : all->hi;
    all->l1 += more->l1;
}

/* Exponent histogram of one chunk, from the exponent fields of its bits. Four tables, since a
 * counter that is raised twice in a row has to wait for its own store. */
typedef struct {
    uint32_t fields[4][2048];
    int64_t powers[EXPONENTS];
} exponent_counts;

#define EXPONENT_COUNTER(TYPE, STORED_TYPE, WORD, MANTISSA, MASK, BIAS)                     \
    static void exponents_##TYPE(const STORED_TYPE *x, int64_t n, exponent_counts *to)      \
    {                                                                                       \
        uint32_t before = 0, after = 0, zero = 0;                                           \
        for (int t = 0; t < 4; t++)                                                         \
            before += to->fields[t][0];                                                     \
        for (int64_t i = 0; i < n; i++) {                                                   \
            WORD bits;                                                                      \
            memcpy(&bits, x + i, sizeof bits);                                              \
            to->fields[i & 3][bits >> MANTISSA & MASK]++;                                   \
            zero += x[i] == 0;                                                              \
        }                                                                                   \
        for (int t = 0; t < 4; t++)                                                         \
            after += to->fields[t][0];                                                      \
        if (after - before == zero)                                                         \
            return;                                                                         \
        for (int64_t i = 0; i < n; i++)                                                     \
            if (x[i] != 0 && fabs((double)x[i]) < ldexp(1.0, 1 - BIAS))                     \
                to->powers[ilogb((double)x[i]) - EXPONENT_MIN]++;                           \
    }                                                                                       \
    static void add_exponents_##TYPE(const exponent_counts *from, int64_t *to)              \
    {                                                                                       \
        for (int field = 1; field < MASK; field++) {                                        \
            int64_t count = 0;                                                              \
            for (int t = 0; t < 4; t++)                                                     \
                count += from->fields[t][field];                                            \
            if (count)                                                                      \
                __atomic_fetch_add(&to[field - BIAS - EXPONENT_MIN], count, __ATOMIC_RELAXED); \
        }                                                                                   \
    }

EXPONENT_COUNTER(float, stored_float, uint32_t, 23, 0xff, 127)
EXPONENT_COUNTER(double, stored_double, uint64_t, 52, 0x7ff, 1023)

/* 64-bit integers: as float64, 2^62 - 1 would round up into the next power of two. */
static void exponents_integer(int kind, const stored_u64 *x, int64_t n, exponent_counts *to)
{
    for (int64_t i = 0; i < n; i++) {
        const uint64_t bits = x[i];
        const uint64_t size = kind == I64 && bits >> 63 ? 0 - bits : bits;
        if (size)
            to->powers[63 - __builtin_clzll(size) - EXPONENT_MIN]++;
    }
}

#endif
