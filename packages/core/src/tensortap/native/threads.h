/* The threads torch itself runs on; found and set by the Python side. */
#ifndef TENSORTAP_THREADS_H
#define TENSORTAP_THREADS_H

/* The signature of `GOMP_parallel`: function, its argument, number of threads, flags. */
typedef void (*parallel_start)(void (*)(void *), void *, unsigned, unsigned);

/* NULL where torch was built without OpenMP. Defined in stats.c. */
extern __attribute__((visibility("hidden"))) parallel_start tensortap_start_threads;

#endif
