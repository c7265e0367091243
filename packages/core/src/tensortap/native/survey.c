/* What a scan of weights asks of a matrix: facts of each row, and how often each 16-bit code occurs.
 *
 * A row is read once from memory and then stays in the cache. One thread: the caller has one
 * matrix for each of its own.
 */
#include <fenv.h>
#include <float.h>
#include <stdlib.h>

#include "blocks.h"

#define CODES 65536
#define COUNT_TABLES 4
#define LEVELS 127

/* Of the finite values of a row. `squares` is their sum of squares, `noise` that of their errors as
 * int8 with a scale of the row's own, `hash` their product with the keys; in the caller's unit. */
typedef struct {
    double squares, noise, hash, largest;
    int64_t odd; /* how many are not finite */
} row_facts;

/* `sums_`: right if all values are finite; else the largest magnitude is not. Rows that are equal
 * value for value have equal sums: each is added up in the same order.
 * `noise_`: against round-half-even of x / scale, as the codec has it. The inverse of the scale is
 * close enough: where it turns a tie, both neighbours are equally far.
 * `finite_`: the slow path. */
#define ROWS(TYPE, STORED_TYPE, ORDER, MAGNITUDE, LEAST, ROUND, IN_UNITS)                         \
    CLONES static void sums_of_row_##TYPE(const STORED_TYPE *x, int64_t n, double scale,          \
                                          const double *keys, ORDER *live, row_facts *out)        \
    {                                                                                             \
        double squares = 0.0, hash = 0.0;                                                         \
        ORDER largest = 0;                                                                        \
        (void)scale;                                                                              \
        _Pragma("omp simd reduction(+:squares,hash) reduction(max:largest)")                      \
        for (int64_t i = 0; i < n; i++) {                                                         \
            const TYPE value = x[i];                                                              \
            ORDER size;                                                                           \
            memcpy(&size, &value, sizeof size);                                                   \
            size &= MAGNITUDE;                                                                    \
            largest = size > largest ? size : largest;                                            \
            live[i] |= size;                                                                      \
            const double scaled = IN_UNITS(value);                                                \
            squares += scaled * scaled;                                                           \
            hash += scaled * keys[i];                                                             \
        }                                                                                         \
        *out = (row_facts){squares, 0.0, hash, of_order_##TYPE(largest), 0};                      \
    }                                                                                             \
    CLONES static double noise_of_row_##TYPE(const STORED_TYPE *x, int64_t n, TYPE largest,       \
                                             double unit)                                         \
    {                                                                                             \
        const TYPE wanted = largest / (TYPE)LEVELS, step = wanted > LEAST ? wanted : LEAST;       \
        const TYPE inverse = 1 / step;                                                            \
        const double scale = unit;                                                                \
        double noise = 0.0;                                                                       \
        (void)scale;                                                                              \
        _Pragma("omp simd reduction(+:noise)")                                                    \
        for (int64_t i = 0; i < n; i++) {                                                         \
            const TYPE rounded = ROUND(x[i] * inverse) * step;                                    \
            const double error = IN_UNITS(x[i] - rounded);                                        \
            noise += error * error;                                                               \
        }                                                                                         \
        return noise;                                                                             \
    }                                                                                             \
    static void finite_of_row_##TYPE(const STORED_TYPE *x, int64_t n, double unit, row_facts *out) \
    {                                                                                             \
        *out = (row_facts){0};                                                                    \
        for (int64_t i = 0; i < n; i++) {                                                         \
            const double size = fabs((double)x[i]);                                               \
            if (!isfinite(size)) {                                                                \
                out->odd++;                                                                       \
                continue;                                                                         \
            }                                                                                     \
            out->squares += (size * unit) * (size * unit);                                        \
            out->largest = size > out->largest ? size : out->largest;                             \
        }                                                                                         \
    }                                                                                             \
    static void facts_of_row_##TYPE(const STORED_TYPE *x, int64_t n, double unit,                 \
                                    const double *keys, ORDER *live, row_facts *out)              \
    {                                                                                             \
        sums_of_row_##TYPE(x, n, unit, keys, live, out);                                          \
        if (isfinite(out->largest))                                                               \
            out->noise = noise_of_row_##TYPE(x, n, (TYPE)out->largest, unit);                     \
        else                                                                                      \
            finite_of_row_##TYPE(x, n, unit, out);                                                \
    }

ROWS(float, stored_float, int32_t, INT32_MAX, FLT_MIN, rintf, UNSCALED)
ROWS(double, stored_double, int64_t, INT64_MAX, DBL_MIN, rint, SCALED)

/* Facts of `rows` rows of `columns` values each, contiguous, `kind` F32, F64, F16 or BF16. `keys`
 * has a random number for each column; `live`, zeros of 4 bytes (F64: 8), comes back as anything but
 * 0 where a column has anything but zeros. Sums are of values times `unit`, which is 1 unless the
 * kind is F64. Returns 0, or -1 when there is no memory for a row. */
int64_t tensortap_survey(const void *data, int64_t kind, int64_t rows, int64_t columns,
                         double unit, const double *keys, void *live, row_facts *out)
{
    const int64_t item = kind == F64 ? 8 : kind == F32 ? 4 : 2;
    float *decoded = item == 2 ? malloc((size_t)columns * sizeof *decoded) : NULL;
    if (item == 2 && columns && !decoded)
        return -1;
    fenv_t before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    for (int64_t row = 0; row < rows; row++) {
        const char *at = (const char *)data + row * columns * item;
        if (kind == F64)
            facts_of_row_double((const void *)at, columns, unit, keys, live, out + row);
        else
            facts_of_row_float(decode_float((int)kind, at, columns, decoded), columns, unit, keys,
                               live, out + row);
    }
    fesetenv(&before);
    free(decoded);
    return 0;
}

/* What is counted of values one by one, and the sum of fourth powers of standardised values. */
typedef struct {
    double fourth;
    int64_t outliers, near_zero;
} element_facts;

#define ELEMENTS(NAME, STORED_TYPE)                                                               \
    CLONES static void NAME(const STORED_TYPE *x, int64_t n, double mean, double inverse,         \
                            double outlier, double near_zero, element_facts *out)                 \
    {                                                                                             \
        double fourth = 0.0;                                                                      \
        int64_t outliers = 0, near = 0;                                                           \
        _Pragma("omp simd reduction(+:fourth,outliers,near)")                                     \
        for (int64_t i = 0; i < n; i++) {                                                         \
            const double value = (double)x[i], apart = value - mean, z = apart * inverse;         \
            fourth += z * z * (z * z);                                                            \
            outliers += fabs(apart) > outlier;                                                    \
            near += fabs(value) <= near_zero;                                                     \
        }                                                                                         \
        out->fourth += fourth;                                                                    \
        out->outliers += outliers;                                                                \
        out->near_zero += near;                                                                   \
    }

ELEMENTS(elements_float, stored_float)
ELEMENTS(elements_double, stored_double)

/* Of `count` values side by side, `kind` F32 or F64: those farther from the mean than `outlier` and
 * those of at most `near_zero`; `inverse` is that of the standard deviation. */
void tensortap_elements(const void *data, int64_t kind, int64_t count, double mean, double inverse,
                        double outlier, double near_zero, element_facts *out)
{
    *out = (element_facts){0};
    fenv_t before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int64_t n = count - start < BLOCK ? count - start : BLOCK;
        if (kind == F64)
            elements_double((const stored_double *)data + start, n, mean, inverse, outlier,
                            near_zero, out);
        else
            elements_float((const stored_float *)data + start, n, mean, inverse, outlier, near_zero,
                           out);
    }
    fesetenv(&before);
}

/* Add how often each 16-bit code occurs to COUNT_TABLES tables, whose sum is meant: a counter
 * raised twice in a row would wait for its own store. At most 2^31 values between two resets. */
void tensortap_count_codes(const stored_half *data, int64_t count, uint32_t *tables)
{
    int64_t i = 0;
    for (; i + COUNT_TABLES <= count; i += COUNT_TABLES)
        for (int t = 0; t < COUNT_TABLES; t++)
            tables[t * CODES + data[i + t]]++;
    for (; i < count; i++)
        tables[data[i]]++;
}
