/* Rounding one float32 to the grid of a small float, and the scale of a block: no loops.
 *
 * Values are handled as their bits, so that infinities and NaN are large integers.
 */
#ifndef TENSORTAP_GRID_H
#define TENSORTAP_GRID_H

#include <stdint.h>
#include <string.h>

#define SIGN ((int32_t)0x80000000)
#define MAGNITUDE 0x7FFFFFFF
#define EXPONENT 0x7F800000
#define QUIET_NAN 0x7FC00000

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

#endif
