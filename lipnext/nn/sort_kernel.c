/* Sort neurons on a CPU without ever forming all distances at once; see sort_kernel.py for the arguments.
 *
 * Ordinary IEEE arithmetic in the order that is written, apart from sums, whose order is free; not to be compiled with
 * -ffast-math: certificates rest on top_float and top_double. `power` is for training alone and accurate to some 1e-6.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 64
#define TILE 8
#define LANES 16
#define SMALLEST 1e-10f

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef vector unaligned __attribute__((aligned(4), may_alias));

#define AT(pointer) (*(const unaligned *)(pointer))

static inline long shorter(long a, long b) { return a < b ? a : b; }

static inline vector size(vector x) { return (vector)((integers)x & 0x7fffffff); }

static inline vector larger(vector a, vector b)
{
    integers mask = a > b;
    return (vector)(((integers)a & mask) | ((integers)b & ~mask));
}

static inline float largest_of(vector v)
{
    float most = v[0];
    for (int i = 1; i < LANES; i++)
        most = v[i] > most ? v[i] : most;
    return most;
}

static inline float sum_of(vector v)
{
    float sum = 0.0f;
    for (int i = 0; i < LANES; i++)
        sum += v[i];
    return sum;
}

/* t^p for t in [0, 1] and p >= 1, at least 2^-100: logarithm and exponential to base 2, both as series. */
static inline __attribute__((always_inline)) vector power(vector t, float p)
{
    integers bits = (integers)t + (0x3f800000 - 0x3f3504f3);
    vector exponent = __builtin_convertvector((bits >> 23) - 127, vector);
    vector m = (vector)((bits & 0x007fffff) + 0x3f3504f3); /* in [sqrt(1/2), sqrt(2)) */
    vector s = (m - 1.0f) / (m + 1.0f), q = s * s;
    vector series = 1.0f + q * (0.33333333f + q * (0.2f + q * (0.14285714f + q * 0.11111111f)));
    vector v = larger(p * (exponent + 2.88539008f * s * series), (vector){0} - 100.0f);
    integers whole = __builtin_convertvector(v - 0.5f, integers);
    vector r = (v - __builtin_convertvector(whole, vector)) * 0.69314718f;
    vector e = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (0.041666667f + r * (0.0083333333f + r * 0.0013888889f)))));
    return e * (vector)((whole + 127) << 23);
}

/* y = (sum_i |x_i - w_i|^p)^(1/p) for the rows [from, to) of all groups x batch rows of x; n is a multiple of LANES. */
void power_forward(const float *x, const float *w, float *y, long batch, long outputs, long n, long from, long to, float p)
{
    float block[(n + BLOCK - 1) / BLOCK], least = powf(1e-8f, 1.0f / p);
    for (long first = 0; first < outputs; first += TILE)
        for (long row = from; row < to; row++) {
            const float *a = x + row * n, *matrix = w + row / batch * outputs * n;
            for (long o = first; o < shorter(first + TILE, outputs); o++) {
                const float *b = matrix + o * n;
                float most = SMALLEST;
                for (long start = 0; start < n; start += BLOCK) {
                    vector far = {0};
                    for (long i = start; i < shorter(start + BLOCK, n); i += LANES)
                        far = larger(size(AT(a + i) - AT(b + i)), far);
                    block[start / BLOCK] = largest_of(far);
                    most = block[start / BLOCK] > most ? block[start / BLOCK] : most;
                }
                float inverse = 1.0f / most;
                vector sum = {0};
                for (long start = 0; start < n; start += BLOCK) {
                    if (block[start / BLOCK] * inverse < least) /* adds less than 1e-8 each */
                        continue;
                    for (long i = start; i < shorter(start + BLOCK, n); i += LANES)
                        sum += power(size(AT(a + i) - AT(b + i)) * inverse, p);
                }
                y[row * outputs + o] = most * powf(sum_of(sum), 1.0f / p);
            }
        }
}

/* Add to dx and dw, for the columns [from, to), the gradients dy sign(x_i - w_i) (|x_i - w_i| / y)^(p - 1). */
void power_backward(const float *x, const float *w, const float *y, const float *dy, float *dx, float *dw, long groups,
                    long batch, long outputs, long n, long from, long to, float p)
{
    float least = powf(1e-8f, 1.0f / (p - 1.0f));
    for (long group = 0; group < groups; group++)
        for (long first = 0; first < outputs; first += TILE)
            for (long row = group * batch; row < (group + 1) * batch; row++)
                for (long start = from; start < to; start += BLOCK)
                    for (long o = first; o < shorter(first + TILE, outputs); o++) {
                        long end = shorter(start + BLOCK, to), place = (group * outputs + o) * n;
                        const float *a = x + row * n, *b = w + place;
                        float *da = dx + row * n, *db = dw + place;
                        float inverse = 1.0f / y[row * outputs + o], g = dy[row * outputs + o];
                        vector far = {0};
                        for (long i = start; i < end; i += LANES)
                            far = larger(size(AT(a + i) - AT(b + i)), far);
                        if (g == 0.0f || largest_of(far) * inverse < least)
                            continue;
                        for (long i = start; i < end; i += LANES) {
                            vector d = AT(a + i) - AT(b + i);
                            vector c = g * power(size(d) * inverse, p - 1.0f);
                            c = (vector)((integers)c ^ ((integers)d & (int32_t)0x80000000)); /* the sign of d */
                            *(unaligned *)(da + i) += c;
                            *(unaligned *)(db + i) -= c;
                        }
                    }
}

/* The largest `terms` of max(w_i - low_i, high_i - w_i), or of max(low_i - w_i, w_i - high_i, 0) if nearest, in descending
 * order: y is their sum weighted by `weights`, index says where they were. Rows have n numbers, of which `length` count.
 *
 * Each of the LANES columns of the row, read as a matrix, holds its largest distance: the `terms`-th of those is at most the
 * `terms`-th of all, so what is below it need not be looked at. */
#define DEFINE_TOP(NAME, REAL, WHOLE)                                                                                  \
    typedef REAL NAME##_vector __attribute__((vector_size(64)));                                                       \
    typedef WHOLE NAME##_integers __attribute__((vector_size(64)));                                                    \
    typedef NAME##_vector NAME##_unaligned __attribute__((aligned(sizeof(REAL)), may_alias));                          \
                                                                                                                       \
    static inline __attribute__((always_inline)) NAME##_vector NAME##_larger(NAME##_vector a, NAME##_vector b)         \
    {                                                                                                                  \
        NAME##_integers mask = a > b;                                                                                  \
        return (NAME##_vector)(((NAME##_integers)a & mask) | ((NAME##_integers)b & ~mask));                            \
    }                                                                                                                  \
                                                                                                                       \
    static void NAME##_insert(REAL *value, int32_t *where, int terms, REAL d, int32_t place)                           \
    {                                                                                                                  \
        int k = terms - 1;                                                                                             \
        for (; k > 0 && value[k - 1] < d; k--)                                                                         \
            value[k] = value[k - 1], where[k] = where[k - 1];                                                          \
        value[k] = d, where[k] = place;                                                                                \
    }                                                                                                                  \
                                                                                                                       \
    void NAME(const REAL *low, const REAL *high, const REAL *w, const REAL *weights, REAL *y, int32_t *index,          \
              long batch, long outputs, long n, long length, long from, long to, int terms, int nearest)               \
    {                                                                                                                  \
        enum { width = 64 / sizeof(REAL), parts = LANES / width };                                                     \
        long blocks = (n + BLOCK - 1) / BLOCK;                                                                         \
        REAL value[terms], distance[blocks * BLOCK], block[blocks * LANES];                                            \
        int32_t where[terms];                                                                                          \
        for (long first = 0; first < outputs; first += TILE)                                                           \
            for (long row = from; row < to; row++) {                                                                   \
                const REAL *a = low + row * n, *b = high + row * n, *matrix = w + row / batch * outputs * n;           \
                for (long o = first; o < shorter(first + TILE, outputs); o++) {                                        \
                    const REAL *c = matrix + o * n;                                                                    \
                    NAME##_vector columns[parts] = {{0}}, none = {0};                                                  \
                    for (long start = 0; start < n; start += BLOCK) {                                                  \
                        NAME##_vector most[parts] = {{0}};                                                             \
                        for (long i = start; i < shorter(start + BLOCK, n); i += LANES)                                \
                            for (int part = 0; part < parts; part++) {                                                 \
                                long at = i + part * width;                                                            \
                                NAME##_vector middle = *(const NAME##_unaligned *)(c + at);                            \
                                NAME##_vector below = *(const NAME##_unaligned *)(a + at) - middle;                    \
                                NAME##_vector above = middle - *(const NAME##_unaligned *)(b + at);                    \
                                NAME##_vector d = nearest ? NAME##_larger(below, above) : NAME##_larger(-below, -above);\
                                d = NAME##_larger(d, none);                                                            \
                                *(NAME##_unaligned *)(distance + at) = d;                                              \
                                most[part] = NAME##_larger(d, most[part]);                                             \
                            }                                                                                          \
                        memcpy(block + start / BLOCK * LANES, most, sizeof most);                                      \
                        for (int part = 0; part < parts; part++)                                                       \
                            columns[part] = NAME##_larger(most[part], columns[part]);                                  \
                    }                                                                                                  \
                    REAL least = -1;                                                                                   \
                    for (int k = 0; k < terms; k++)                                                                    \
                        value[k] = -1, where[k] = 0;                                                                   \
                    if (terms <= LANES) {                                                                              \
                        for (int k = 0; k < LANES; k++) {                                                              \
                            REAL d = columns[k / width][k % width];                                                    \
                            if (d > value[terms - 1])                                                                  \
                                NAME##_insert(value, where, terms, d, 0);                                              \
                        }                                                                                              \
                        least = value[terms - 1];                                                                      \
                        for (int k = 0; k < terms; k++)                                                                \
                            value[k] = -1;                                                                             \
                    }                                                                                                  \
                    for (long group = 0; group < blocks * LANES; group++) {                                            \
                        if (block[group] < least)                                                                      \
                            continue;                                                                                  \
                        long start = group / LANES * BLOCK;                                                            \
                        for (long i = start + group % LANES; i < shorter(start + BLOCK, length); i += LANES)           \
                            if (distance[i] >= least && distance[i] > value[terms - 1])                                \
                                NAME##_insert(value, where, terms, distance[i], (int32_t)i);                           \
                    }                                                                                                  \
                    REAL sum = 0;                                                                                      \
                    for (int k = 0; k < terms; k++)                                                                    \
                        sum += weights[k] * value[k];                                                                  \
                    y[row * outputs + o] = sum;                                                                        \
                    memcpy(index + (row * outputs + o) * terms, where, terms * sizeof(int32_t));                       \
                }                                                                                                      \
            }                                                                                                          \
    }

DEFINE_TOP(top_float, float, int32_t)
DEFINE_TOP(top_double, double, int64_t)
