/* How far one tensor lies from another: the largest and the summed distance, and nothing else. */
#include "pairs.h"

CLONES static void add_change(const stored_double *ref, const stored_double *other, int64_t n,
                              double *change)
{
    double sum = 0;
    int64_t most = 0; /* as integers, NaN is larger than all other sizes */
    _Pragma("omp simd reduction(+:sum) reduction(max:most)")
    for (int64_t i = 0; i < n; i++) {
        const double far = fabs(other[i] - ref[i]);
        const int64_t bits = bits_of(far);
        sum += far;
        most = bits > most ? bits : most;
    }
    const double size = of_order_double(most);
    change[0] = size > change[0] || isnan(size) ? size : change[0];
    change[1] += sum;
}

/* Add `n` pairs to the largest and the summed |other - ref|: NaN once one of them is. */
void tensortap_compare_change(const side *ref, const side *other, int64_t n, double *change)
{
    double ref_values[PAIRS], other_values[PAIRS];
    uint8_t ref_bytes[PAIRS], other_bytes[PAIRS];
    for (int64_t start = 0; start < n; start += PAIRS) {
        const int64_t some = n - start < PAIRS ? n - start : PAIRS;
        const char *r = stored_at(ref, start, some, ref_bytes);
        const char *o = stored_at(other, start, some, other_bytes);
        add_change(values_at(ref, r, some, ref_values), values_at(other, o, some, other_values),
                   some, change);
    }
}
