/* The one C ABI between quantforge and its compiled kernels, CPU and CUDA.
 *
 * A kernel is found by (codec, op) in the table that qf_open returns. It never allocates for the
 * caller, prints or exits; it returns one of the codes below. Arrays are dense and row-major.
 *
 *   op                  in                                              out
 *   encode              w f32[rows, in], optional importance f32[in]    one u8[rows, row_bytes]
 *   decode              u8[rows, row_bytes]                             f32[rows, in]
 *   matmul              x f32[m, in], rows i64[2], what w is stored in  f32[m, out], of which columns rows[0] : rows[1]
 *   matmul_int8         the same, x as round_activations gives it       the same
 *   round_activations   x f32[m, in]; the codec is ""                   u8[m, bytes]: 8-bit integers and their scales
 *
 * The CUDA library has encode and decode; for planes (nn/planes.py), by the name of their kernel family, linear and
 * dequantize; and feedback (cuda/feedback.cu).
 */
#ifndef QUANTFORGE_H
#define QUANTFORGE_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QF_ABI 3
#define QF_API __attribute__((visibility("default")))

/* QF_EDEVICE comes with CUDA's own error in the bits above the lowest eight. QF_ELARGE: all is encoded, but of weights so
 * large that what is stored in f16 or bf16 may have overflowed; the caller looks. */
enum { QF_OK = 0, QF_ESHAPE = 1, QF_EDTYPE = 2, QF_ENONFINITE = 3, QF_ENOMEM = 4, QF_EDEVICE = 5, QF_ELARGE = 6 };

enum { QF_U8 = 0, QF_I8, QF_U16, QF_I16, QF_U32, QF_I32, QF_I64, QF_F16, QF_BF16, QF_F32, QF_F64 };

typedef struct {
    void   *data;
    int64_t shape[4];
    int32_t ndim, dtype;
} qf_array;

typedef int (*qf_fn)(const qf_array *in, int n_in, qf_array *out, int n_out, void *stream);

typedef struct {
    const char *codec, *op;
    qf_fn       fn;
} qf_kernel;

typedef struct {
    int32_t          abi, n;
    const char      *isa;
    const qf_kernel *kernels;
} qf_table;

/* The table for an instruction set ("scalar", "avx2", ...), or the best this CPU runs when isa is
 * NULL. Returns NULL for an unknown name or one that this CPU cannot run. */
QF_API const qf_table *qf_open(const char *isa);

/* A product (matmul) in so many threads, the caller's among them: fn over parts of the rows that input `span` names. Results
 * do not depend on their number. Only the CPU's library has it. */
QF_API int qf_product(qf_fn fn, const qf_array *in, int n_in, qf_array *out, int n_out, int span, int threads);

/* The i-th instruction set compiled into this library that this CPU can run, best first, or NULL. */
QF_API const char *qf_isa(int i);

#ifdef __cplusplus
}
#endif
#endif
