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

/* Of the finite values of a row. `squares` is their sum of squares and `noise` that of their
 * errors as int8 with a scale of the row's own, both times unit^2. */
typedef struct {
    double squares, largest, noise;
    uint64_t hash;
    int64_t zeros, odd; /* the last: how many are not finite */
} row_facts;

static inline uint64_t bits_of_float(float value, uint32_t key)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint64_t)bits * key;
}

static inline uint64_t bits_of_double(double value, uint32_t key)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits & UINT32_MAX) * key + (bits >> 32) * (key * 0x9E3779B1u | 1);
}

/* `codes_`: the hash is linear with random keys, and equal for equal values: -0.0 + 0.0 is 0.0.
 * `noise_`: the values of the int8 codec, bit for bit: round-half-even of x / scale. */
#define ROWS(TYPE, STORED_TYPE, ORDER, MAGNITUDE, LEAST, ROUND)                                   \
    CLONES static void sums_of_row_##TYPE(const STORED_TYPE *x, int64_t n, double unit,           \
                                          row_facts *out)                                         \
    {                                                                                             \
        double squares = 0.0;                                                                     \
        ORDER largest = 0;                                                                        \
        int64_t zeros = 0;                                                                        \
        _Pragma("omp simd reduction(+:squares,zeros) reduction(max:largest)")                     \
        for (int64_t i = 0; i < n; i++) {                                                         \
            const TYPE value = x[i];                                                              \
            ORDER size;                                                                           \
            memcpy(&size, &value, sizeof size);                                                   \
            size &= MAGNITUDE;                                                                    \
            largest = size > largest ? size : largest;                                            \
            zeros += size == 0;                                                                   \
            const double scaled = (double)value * unit;                                           \
            squares += scaled * scaled;                                                           \
        }                                                                                         \
        *out = (row_facts){squares, of_order_##TYPE(largest), 0.0, 0, zeros, 0};                  \
    }                                                                                             \
    CLONES static uint64_t codes_of_row_##TYPE(const STORED_TYPE *x, int64_t n,                   \
                                               const uint32_t *keys, uint8_t *live)               \
    {                                                                                             \
        uint64_t hash = 0;                                                                        \
        _Pragma("omp simd reduction(+:hash)")                                                     \
        for (int64_t i = 0; i < n; i++) {                                                         \
            hash += bits_of_##TYPE(x[i] + (TYPE)0.0, keys[i]);                                    \
            live[i] |= x[i] != 0;                                                                 \
        }                                                                                         \
        return hash;                                                                              \
    }                                                                                             \
    CLONES static double noise_of_row_##TYPE(const STORED_TYPE *x, int64_t n, TYPE largest,       \
                                             double unit)                                         \
    {                                                                                             \
        const TYPE wanted = largest / (TYPE)LEVELS, scale = wanted > LEAST ? wanted : LEAST;      \
        double noise = 0.0;                                                                       \
        _Pragma("omp simd reduction(+:noise)")                                                    \
        for (int64_t i = 0; i < n; i++) {                                                         \
            TYPE code = ROUND(x[i] / scale);                                                      \
            code = code < (TYPE)LEVELS ? code : (TYPE)LEVELS;                                     \
            code = code > -(TYPE)LEVELS ? code : -(TYPE)LEVELS;                                   \
            const TYPE rounded = code * scale;                                                    \
            const double error = ((double)x[i] - (double)rounded) * unit;                         \
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
            out->zeros += size == 0.0;                                                            \
            out->squares += (size * unit) * (size * unit);                                        \
            out->largest = size > out->largest ? size : out->largest;                             \
        }                                                                                         \
    }                                                                                             \
    static void facts_of_row_##TYPE(const STORED_TYPE *x, int64_t n, double unit,                 \
                                    const uint32_t *keys, uint8_t *live, row_facts *out)          \
    {                                                                                             \
        sums_of_row_##TYPE(x, n, unit, out);                                                      \
        if (isfinite(out->largest))                                                               \
            out->noise = noise_of_row_##TYPE(x, n, (TYPE)out->largest, unit);                     \
        else                                                                                      \
            finite_of_row_##TYPE(x, n, unit, out);                                                \
        out->hash = codes_of_row_##TYPE(x, n, keys, live);                                        \
    }

ROWS(float, stored_float, int32_t, INT32_MAX, FLT_MIN, rintf)
ROWS(double, stored_double, int64_t, INT64_MAX, DBL_MIN, rint)

/* Facts of `rows` rows of `columns` values each, contiguous, `kind` F32, F64, F16 or BF16. `keys`
 * has a random number for each column; `live` gets a 1 where a column holds anything but zeros.
 * Returns 0, or -1 when there is no memory for a row. */
int64_t tensortap_survey(const void *data, int64_t kind, int64_t rows, int64_t columns,
                         double unit, const uint32_t *keys, uint8_t *live, row_facts *out)
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
