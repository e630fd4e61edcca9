/* Vectors of float in the compiler's own vector types, so that one source serves every processor; and the element type
 * of weights, activations and keys: bfloat16 with -DBFLOAT16, float without. */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

/* VL floats a vector; a product keeps MR rows by NV vectors of sums, which must fit the registers. */
#if defined(__AVX512F__)
enum { VL = 16, NV = 4, MR = 6 };
#define HAS_NARROW_TILES 1 /* as linear.h has them; timed on this one only */
#elif defined(__AVX2__)
enum { VL = 8, NV = 2, MR = 4 };
#elif defined(__aarch64__)
enum { VL = 4, NV = 4, MR = 6 };
#else
enum { VL = 4, NV = 2, MR = 4 };
#endif
#ifndef HAS_NARROW_TILES
#define HAS_NARROW_TILES 0
#endif
#if defined(BFLOAT16) && defined(__AVX512BF16__)
#define BF16_DOT 1
#else
#define BF16_DOT 0
#endif

typedef float vfloat __attribute__((vector_size(VL * 4)));
typedef int32_t vint __attribute__((vector_size(VL * 4)));
typedef uint32_t vword __attribute__((vector_size(VL * 4)));
typedef uint16_t vhalf __attribute__((vector_size(VL * 2)));
typedef float vfloat_any __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vword_any __attribute__((vector_size(VL * 4), aligned(2), may_alias));
typedef uint16_t vhalf_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));
typedef uint32_t word __attribute__((aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t parts_of(int64_t all, int64_t size) { return (all + size - 1) / size; }

INLINE vfloat splat(float x) { return x - (vfloat){0}; }
INLINE vfloat load(const float *p) { return *(const vfloat_any *)p; }
INLINE void store(float *p, vfloat x) { *(vfloat_any *)p = x; }
INLINE vword chosen(vint which, vword a, vword b) { return (a & (vword)which) | (b & ~(vword)which); }

/* NaN in `a` stays, here and in at_most; the processor's maximum gives its second operand then. */
INLINE vfloat at_least(vfloat a, vfloat low) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_max_ps((__m512)low, (__m512)a);
#else
    return (vfloat)chosen(a < low, (vword)low, (vword)a);
#endif
}

INLINE vfloat at_most(vfloat a, vfloat high) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_min_ps((__m512)high, (__m512)a);
#else
    return (vfloat)chosen(a > high, (vword)high, (vword)a);
#endif
}

INLINE float sum_of(vfloat x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0;
    UNROLL for (int i = 0; i < VL; i++) sum += x[i];
    return sum;
#endif
}

INLINE float max_of(vfloat x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float best = x[0];
    UNROLL for (int i = 1; i < VL; i++) best = x[i] > best ? x[i] : best;
    return best;
#endif
}

/* a * b, rounded here and now: not fused with an addition, which some processors could do and others not. */
INLINE vfloat product_of(vfloat a, vfloat b) {
    vfloat product = a * b;
#if defined(__AVX512F__)
    __asm__("" : "+v"(product));
#elif defined(__SSE2__)
    __asm__("" : "+x"(product));
#elif defined(__aarch64__)
    __asm__("" : "+w"(product));
#else
    __asm__("" : "+m"(product));
#endif
    return product;
}

/* e^x to 2 units in the last place between -87.3 and 88, which it is held to; NaN stays.
 * Cody & Waite's reduction, then the polynomial of Cephes' expf. */
INLINE vfloat exp_of(vfloat x) {
    x = at_most(at_least(x, splat(-87.3f)), splat(88.0f));
    const vfloat magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vfloat shifted = x * 1.44269504088896341f + magic;
    vfloat n = shifted - magic;
    vfloat r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vfloat p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vint power = ((vint)shifted - (vint)magic + 127) << 23;
    return p * (vfloat)power;
}

#if defined(BFLOAT16)
typedef uint16_t element;
#define PER_WORD 2

INLINE float widened(element x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

INLINE vfloat load_elements(const element *p) {
    return (vfloat)(__builtin_convertvector(*(const vhalf_any *)p, vword) << 16);
}

INLINE void store_elements(element *p, vfloat x) {
#if defined(__AVX512BF16__)
    __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
    memcpy(p, &narrow, sizeof narrow);
#else
    vword bits = (vword)x;
    vword rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vword quiet = (bits >> 16) | 0x40;
    vhalf narrow = __builtin_convertvector(chosen(x == x, rounded, quiet), vhalf);
    *(vhalf_any *)p = narrow;
#endif
}

INLINE element narrowed(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (element)(bits >> 16 | 0x40);
    return (element)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* Of a vector of words the first elements of all, then the second ones. */
INLINE void widen(vword words, vfloat out[PER_WORD]) {
    out[0] = (vfloat)(words << 16);
    out[1] = (vfloat)(words & 0xffff0000u);
}

/* Floats as `widen` leaves them. */
INLINE void put_in_order(float *p) {
    vfloat first = load(p), second = load(p + VL);
    for (int i = 0; i < VL; i++) p[2 * i] = first[i], p[2 * i + 1] = second[i];
}
#else
typedef float element;
#define PER_WORD 1

INLINE float widened(element x) { return x; }
INLINE element narrowed(float x) { return x; }
INLINE vfloat load_elements(const element *p) { return load(p); }
INLINE void store_elements(element *p, vfloat x) { store(p, x); }
INLINE void widen(vword words, vfloat out[PER_WORD]) { out[0] = (vfloat)words; }
INLINE void put_in_order(float *p) { (void)p; }
#endif

/* n words at most; the others are zero. */
INLINE vword load_words(const element *p, int64_t n) {
    if (n >= VL) return *(const vword_any *)p;
#if defined(__AVX512F__)
    return (vword)_mm512_maskz_loadu_epi32((__mmask16)((1 << n) - 1), p);
#else
    vword padded = {0};
    memcpy(&padded, p, n * 4);
    return padded;
#endif
}

#if BF16_DOT
INLINE vfloat add_products(vfloat sum, vword a, vword b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

/* sum + w * x, where a word is a float or a pair of bfloat16 whose two products are both added. */
INLINE vfloat add_product(vfloat sum, vword w, uint32_t x) {
#if BF16_DOT
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)x));
#elif defined(BFLOAT16)
    vword pair = x - (vword){0};
    sum += (vfloat)(w << 16) * (vfloat)(pair << 16);
    return sum + (vfloat)(w & 0xffff0000u) * (vfloat)(pair & 0xffff0000u);
#else
    return sum + (vfloat)w * (vfloat)(x - (vword){0});
#endif
}

/* The next four take n elements at most: a row's last vector may be short. */
INLINE vfloat load_some(const element *p, int64_t n) {
    if (n >= VL) return load_elements(p);
    element padded[VL] = {0};
    memcpy(padded, p, n * sizeof(element));
    return load_elements(padded);
}

INLINE void store_some(element *p, vfloat x, int64_t n) {
    if (n >= VL) {
        store_elements(p, x);
        return;
    }
    element padded[VL];
    store_elements(padded, x);
    memcpy(p, padded, n * sizeof(element));
}

INLINE vfloat load_floats(const float *p, int64_t n) {
    if (n >= VL) return load(p);
    float padded[VL] = {0};
    memcpy(padded, p, n * 4);
    return load(padded);
}

INLINE void store_floats(float *p, vfloat x, int64_t n) {
    if (n >= VL)
        store(p, x);
    else
        memcpy(p, &x, n * 4);
}
