/* How the kernels are compiled for several processors at once. */
#ifndef TENSORTAP_CLONES_H
#define TENSORTAP_CLONES_H

#include <stdint.h> /* any header of the C library, which says whether that is glibc */

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(TENSORTAP_NO_CLONES)
/* One library for every x86-64 machine: the loader picks the widest copy the CPU can run. */
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define HAVE_CLONES 1
#else
#define CLONES
#define HAVE_CLONES 0
#endif

#endif
