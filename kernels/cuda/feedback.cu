// GPTQ's loop over some columns: each is rounded and the later ones make up for its error. Rows know nothing of each other.
//
//   op        in                                                                    out
//   feedback  w f32[columns, rows], u f32[columns, columns] (upper triangle),       codes u8[columns, rows],
//             step f32[columns, rows], offset the same or f32[0]: value =           errors f32[columns, rows]:
//             step · (code − zero) − offset; i32[3] on the host: zero,              (w − value) / u[j][j]
//             lowest, highest code; at most 128 columns; the codec is ""
#include "encode.cuh"

namespace {

constexpr int ROW = 8, MOST = 128, OWN = MOST / ROW;  // threads of a row; columns; those of a thread: its number, and every 8th on

struct FeedbackArgs {
    const float *w, *u, *step, *offset;
    uint8_t *codes;
    float *errors;
    int64_t rows;
    int columns;
    float zero, lowest, highest;
};

__global__ void __launch_bounds__(128) feedback_kernel(FeedbackArgs a) {
    const int t = (int)threadIdx.x % ROW;
    const int64_t mine = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / ROW, row = mine < a.rows ? mine : a.rows - 1;
    float x[OWN], step[OWN], offset[OWN];
    QF_UNROLL
    for (int i = 0; i < OWN; i++) {
        const bool inside = i * ROW + t < a.columns;
        const int64_t at = inside ? (i * ROW + t) * a.rows + row : 0;
        x[i] = inside ? a.w[at] : 0, step[i] = inside ? a.step[at] : 0, offset[i] = inside && a.offset ? a.offset[at] : 0;
    }
    QF_UNROLL
    for (int i = 0; i < OWN; i++) {
        QF_NO_UNROLL_GPU
        for (int owner = 0; owner < ROW; owner++) {
            const int j = i * ROW + owner;
            if (j >= a.columns) break;
            // all threads of the row do what only one's numbers are meant for
            const float *const u = a.u + (int64_t)j * a.columns;
            const float level = step[i] == 0 ? 0 : rintf((x[i] + offset[i]) / step[i]);
            const float code = fminf(fmaxf(level, a.lowest - a.zero), a.highest - a.zero);
            const float own = (x[i] - (step[i] * code - offset[i])) / u[j];
            const float error = __shfl_sync(~0u, own, owner, ROW);
            if (t == owner && mine == row) {
                a.codes[j * a.rows + row] = (uint8_t)(code + a.zero);
                a.errors[j * a.rows + row] = error;
            }
            QF_UNROLL
            for (int k = i; k < OWN; k++)  // below its diagonal u is 0
                if (k * ROW + t < a.columns) x[k] = fmaf(-error, u[k * ROW + t], x[k]);
        }
    }
}

bool is_matrix(const qf_array &m, int64_t columns, int64_t rows) { return m.ndim == 2 && m.shape[0] == columns && m.shape[1] == rows; }

int feedback(const qf_array *in, int n_in, qf_array *out, int n_out, [[maybe_unused]] void *stream) {
    if (n_in != 5 || n_out != 2 || in[0].ndim != 2) return QF_ESHAPE;
    const int64_t columns = in[0].shape[0], rows = in[0].shape[1];
    const bool moved = in[3].shape[0] != 0;
    if (columns > MOST || !is_matrix(in[1], columns, columns) || !is_matrix(in[2], columns, rows)) return QF_ESHAPE;
    if ((moved && !is_matrix(in[3], columns, rows)) || in[4].ndim != 1 || in[4].shape[0] != 3) return QF_ESHAPE;
    if (!is_matrix(out[0], columns, rows) || !is_matrix(out[1], columns, rows)) return QF_ESHAPE;
    for (int i = 0; i < 4; i++)
        if (in[i].dtype != QF_F32) return QF_EDTYPE;
    if (in[4].dtype != QF_I32 || out[0].dtype != QF_U8 || out[1].dtype != QF_F32) return QF_EDTYPE;
    if (!columns || !rows) return QF_OK;
    const int32_t *const levels = (const int32_t *)in[4].data;
    const FeedbackArgs a = {
        (const float *)in[0].data, (const float *)in[1].data, (const float *)in[2].data, moved ? (const float *)in[3].data : nullptr,
        (uint8_t *)out[0].data, (float *)out[1].data, rows, (int)columns,
        (float)levels[0], (float)levels[1], (float)levels[2],
    };
    return QF_LAUNCH(feedback_kernel, (unsigned)((rows * ROW + 127) / 128), 128, stream, a);
}

}  // namespace

extern const qf_kernel feedback_kernels[];
const qf_kernel feedback_kernels[] = {{"", "feedback", feedback}, {}};
