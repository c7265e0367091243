/* One float32 to HiFloat8, as a value and as a code: no loops. */
#ifndef TENSORTAP_HIFLOAT8_H
#define TENSORTAP_HIFLOAT8_H

#include "grid.h"

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

#endif
