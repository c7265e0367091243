/* Totals of compared pairs: of one block, and merged in order. */
#ifndef TENSORTAP_TOTALS_H
#define TENSORTAP_TOTALS_H

#include <stdlib.h>

#include "pairs.h"

#define COUNTERS 9

typedef struct {
    double lo, hi, mean, m2; /* the mean as seen from the origin */
} moments;

typedef struct {
    /* The first COUNTERS of these are added up. */
    int64_t count, compared, nan_ref, nan_other, inf_ref, inf_other, mismatches, unequal, zero;
    int64_t at;
    uint64_t ulp_max;
    moments ref, other, difference;
    double abs_ref, abs_difference, comoment, largest, relative_max, relative_sum, ulp_sum;
} totals;

static const totals NO_PAIRS = {
    .at = -1, .ref = {INFINITY, -INFINITY, 0, 0}, .other = {INFINITY, -INFINITY, 0, 0},
    .difference = {INFINITY, -INFINITY, 0, 0}, .largest = -1.0};

#define ORDER_MIN(to, value) ((to) = (value) < (to) ? (value) : (to))
#define ORDER_MAX(to, value) ((to) = (value) > (to) ? (value) : (to))

static moments moments_of(double sum, double squares, double shift, double origin, int64_t n,
                          int64_t lo, int64_t hi)
{
    const double m2 = squares - sum * (sum / (double)n);
    return (moments){of_order_double(lo) + 0.0, of_order_double(hi) + 0.0,
                     (shift - origin) + sum / (double)n, m2 < 0.0 ? 0.0 : m2};
}

CLONES static void add_sides(const stored_double *ref, const stored_double *other, int64_t n,
                             const frame *f, totals *t)
{
    const double ref_unit = f->ref, other_unit = f->other;
    const double ref_shift = ref[0] * ref_unit, other_shift = other[0] * other_unit;
    double sum_r = 0, sum_o = 0, squares_r = 0, squares_o = 0, products = 0, size = 0;
    int64_t lo_r = order_of_double(INFINITY), lo_o = lo_r;
    int64_t hi_r = order_of_double(-INFINITY), hi_o = hi_r;
#pragma omp simd reduction(+:sum_r,sum_o,squares_r,squares_o,products,size) \
    reduction(min:lo_r,lo_o) reduction(max:hi_r,hi_o)
    for (int64_t i = 0; i < n; i++) {
        const double r = ref[i] * ref_unit - ref_shift, o = other[i] * other_unit - other_shift;
        sum_r += r;
        sum_o += o;
        squares_r += r * r;
        squares_o += o * o;
        products += r * o;
        size += fabs(ref[i] * ref_unit);
        const int64_t order_r = order_of_double(ref[i]), order_o = order_of_double(other[i]);
        ORDER_MIN(lo_r, order_r);
        ORDER_MAX(hi_r, order_r);
        ORDER_MIN(lo_o, order_o);
        ORDER_MAX(hi_o, order_o);
    }
    t->compared = n;
    t->ref = moments_of(sum_r, squares_r, ref_shift, f->ref_origin, n, lo_r, hi_r);
    t->other = moments_of(sum_o, squares_o, other_shift, f->other_origin, n, lo_o, hi_o);
    t->comoment = products - sum_r * (sum_o / (double)n);
    t->abs_ref = size;
}

/* Also leaves the differences and the relative ones, for the histograms. */
CLONES static void add_differences(const stored_double *ref, const stored_double *other, int64_t n,
                                   const frame *given, double *apart_by, double *relative_by,
                                   totals *t)
{
    const frame f = *given;
    const double shift = apart(ref[0], other[0], &f) * f.difference;
    double sum = 0, squares = 0, size = 0, relatives = 0;
    int64_t lo = order_of_double(INFINITY), hi = order_of_double(-INFINITY), most = 0, zero = 0;
#pragma omp simd reduction(+:sum,squares,size,relatives,zero) reduction(min:lo) \
    reduction(max:hi,most)
    for (int64_t i = 0; i < n; i++) {
        const double d = apart(ref[i], other[i], &f), q = relative(d, ref[i], &f);
        const double from_shift = d * f.difference - shift;
        sum += from_shift;
        squares += from_shift * from_shift;
        size += fabs(d * f.difference);
        relatives += q;
        zero += d == 0;
        apart_by[i] = d;
        relative_by[i] = copysign(q, d);
        const int64_t order = order_of_double(d), bits = bits_of(q);
        ORDER_MIN(lo, order);
        ORDER_MAX(hi, order);
        ORDER_MAX(most, bits);
    }
    t->difference = moments_of(sum, squares, shift, f.difference_origin, n, lo, hi);
    t->largest = fmax(fabs(t->difference.lo), fabs(t->difference.hi));
    t->abs_difference = size;
    t->relative_sum = relatives;
    t->relative_max = of_order_double(most);
    t->zero = zero;
}

static int64_t place_of(const double *apart_by, int64_t n, double largest)
{
    int64_t i = 0;
    while (i < n - 1 && fabs(apart_by[i]) != largest)
        i++;
    return i;
}

/* How far apart floats of one kind are, in representable values; the two zeros are one. */
#define ULPS(NAME, WORD, DISTANCE, SIGN)                                                        \
    CLONES static void NAME(const WORD *ref, const WORD *other, int64_t n, totals *t)           \
    {                                                                                           \
        DISTANCE most = 0;                                                                      \
        double sum = 0;                                                                         \
        _Pragma("omp simd reduction(+:sum) reduction(max:most)")                                \
        for (int64_t i = 0; i < n; i++) {                                                       \
            const DISTANCE r = (DISTANCE)(ref[i] & (((WORD)1 << SIGN) - 1));                    \
            const DISTANCE o = (DISTANCE)(other[i] & (((WORD)1 << SIGN) - 1));                  \
            const DISTANCE same = r > o ? r - o : o - r;                                        \
            const DISTANCE far = (ref[i] ^ other[i]) >> SIGN & 1 ? r + o : same;                \
            sum += (double)far;                                                                 \
            ORDER_MAX(most, far);                                                               \
        }                                                                                       \
        t->ulp_max = (uint64_t)most;                                                            \
        t->ulp_sum = sum;                                                                       \
    }

ULPS(ulps_16, stored_half, uint32_t, 15)
ULPS(ulps_32, stored_u32, uint32_t, 31)
ULPS(ulps_64, stored_u64, uint64_t, 63)

static void add_ulps(const side *s, const void *ref, const void *other, int64_t n, totals *t)
{
    switch (stored_size(s->kind)) {
    case 2: ulps_16(ref, other, n, t); return;
    case 4: ulps_32(ref, other, n, t); return;
    default: ulps_64(ref, other, n, t);
    }
}

static void merge_moments(moments *all, double before, const moments *more, double added)
{
    const double share = added / (before + added), gap = more->mean - all->mean;
    all->m2 += more->m2 + gap * gap * (before * share);
    all->mean += gap * share;
    all->lo = more->lo < all->lo ? more->lo : all->lo;
    all->hi = more->hi > all->hi ? more->hi : all->hi;
}

/* Adds `more` to `all` (Chan, Golub and LeVeque, 1979); of equal largest differences the first
 * counts, so the caller keeps the order. */
static void merge_totals(totals *all, const totals *more)
{
    const double before = (double)all->compared, added = (double)more->compared;
    if (more->compared) {
        const double gaps = (more->ref.mean - all->ref.mean) * (more->other.mean - all->other.mean);
        all->comoment += more->comoment + gaps * (before * (added / (before + added)));
        merge_moments(&all->ref, before, &more->ref, added);
        merge_moments(&all->other, before, &more->other, added);
        merge_moments(&all->difference, before, &more->difference, added);
    }
    if (more->largest > all->largest) {
        all->largest = more->largest;
        all->at = more->at;
    }
    all->relative_max = fmax(all->relative_max, more->relative_max);
    all->ulp_max = more->ulp_max > all->ulp_max ? more->ulp_max : all->ulp_max;
    all->abs_ref += more->abs_ref;
    all->abs_difference += more->abs_difference;
    all->relative_sum += more->relative_sum;
    all->ulp_sum += more->ulp_sum;
    int64_t *to = &all->count;
    const int64_t *from = &more->count;
    for (int i = 0; i < COUNTERS; i++)
        to[i] += from[i];
}

#endif
