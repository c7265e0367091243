/* In which order the elements of a strided tensor are read: its storage order.
 *
 * Statistics do not depend on the order, so axes are sorted by stride and merged. A tensor that
 * is dense in any order becomes one run and is read in place; others are gathered block by block.
 * Axes of stride 0 are dropped: their elements are counted `repeat` times instead.
 */
#ifndef TENSORTAP_WALK_H
#define TENSORTAP_WALK_H

#include <stdint.h>
#include <string.h>

#define MAX_AXES 66

enum { NEGATE = 1, CONJUGATE = 2 };

typedef struct {
    const char *data;
    int64_t item; /* bytes of an element */
    int64_t count; /* elements to read */
    int64_t repeat;
    int64_t flags;
    int axes; /* 0: one run */
    int64_t size[MAX_AXES], stride[MAX_AXES]; /* outermost first; strides in elements */
} walk;

static void insert_axis(walk *w, int64_t size, int64_t stride)
{
    int at = w->axes++;
    for (; at > 0 && w->stride[at - 1] < stride; at--) {
        w->size[at] = w->size[at - 1];
        w->stride[at] = w->stride[at - 1];
    }
    w->size[at] = size;
    w->stride[at] = stride;
}

static void merge_axes(walk *w)
{
    int last = 0;
    for (int axis = 1; axis < w->axes; axis++) {
        if (w->stride[last] == w->size[axis] * w->stride[axis]) {
            w->size[last] *= w->size[axis];
        } else {
            last++;
            w->size[last] = w->size[axis];
        }
        w->stride[last] = w->stride[axis];
    }
    w->axes = w->axes ? last + 1 : 0;
    if (w->axes == 1 && w->stride[0] == 1)
        w->axes = 0;
}

/* `dims` holds `axes` sizes, then as many strides; NULL for a contiguous tensor. */
static walk plan(const void *data, int64_t item, int64_t count, int64_t flags, int64_t axes,
                 const int64_t *dims)
{
    walk w = {.data = data, .item = item, .count = count, .repeat = 1, .flags = flags};
    if (!dims || !count)
        return w;
    for (int64_t axis = 0; axis < axes; axis++) {
        const int64_t size = dims[axis], stride = dims[axes + axis];
        if (stride == 0)
            w.repeat *= size;
        else if (size != 1)
            insert_axis(&w, size, stride);
    }
    w.count /= w.repeat;
    merge_axes(&w);
    return w;
}

#define COPY_STRIDED(TYPE)                                                        \
    for (int64_t i = 0; i < n; i++)                                               \
        memcpy(to + i * (int64_t)sizeof(TYPE), from + i * step, sizeof(TYPE))

static void copy_row(char *to, const char *from, int64_t n, int64_t step, int64_t item)
{
    if (step == item)
        memcpy(to, from, (size_t)(n * item));
    else if (item == 1)
        COPY_STRIDED(uint8_t);
    else if (item == 2)
        COPY_STRIDED(uint16_t);
    else if (item == 4)
        COPY_STRIDED(uint32_t);
    else
        COPY_STRIDED(uint64_t);
}

/* Step `index` to the next row; the innermost axis starts at its beginning again. */
static void next_row(const walk *w, int64_t *index)
{
    index[w->axes - 1] = 0;
    for (int axis = w->axes - 2; axis >= 0; axis--) {
        if (++index[axis] < w->size[axis])
            return;
        index[axis] = 0;
    }
}

static void gather(const walk *w, int64_t start, int64_t n, char *to)
{
    const int inner = w->axes - 1;
    int64_t index[MAX_AXES];
    for (int axis = inner; axis >= 0; axis--) {
        index[axis] = start % w->size[axis];
        start /= w->size[axis];
    }
    while (n > 0) {
        int64_t offset = 0, row = w->size[inner] - index[inner];
        for (int axis = 0; axis <= inner; axis++)
            offset += index[axis] * w->stride[axis];
        row = row < n ? row : n;
        copy_row(to, w->data + offset * w->item, row, w->stride[inner] * w->item, w->item);
        to += row * w->item;
        n -= row;
        next_row(w, index);
    }
}

/* Flip the sign bits of gathered floats: all of them (a negated view) or, of a conjugated view,
 * those of the imaginary parts, which lie at odd places. */
static void flip_signs(const walk *w, int64_t n, char *values)
{
    for (int64_t i = 0; i < n; i++)
        if (!(w->flags & NEGATE) != !(w->flags & CONJUGATE && i & 1))
            values[(i + 1) * w->item - 1] ^= (char)0x80;
}

/* `n` elements from `start` on: where they lie if that is possible, else copied to `buffer`. */
static const void *fetch(const walk *w, int64_t start, int64_t n, char *buffer)
{
    if (!w->axes && !w->flags)
        return w->data + start * w->item;
    if (w->axes)
        gather(w, start, n, buffer);
    else
        memcpy(buffer, w->data + start * w->item, (size_t)(n * w->item));
    if (w->flags)
        flip_signs(w, n, buffer);
    return buffer;
}

#endif
