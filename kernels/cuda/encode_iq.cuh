// The IQ types over a matrix on a GPU (iquants_walk.inc on a CPU). IQ4: a thread per 32 weights, whose
// weights and importance are registers. IQ1-3: a warp per super-block, a group of eight weights per
// thread, the tables of costs in shared memory, a column per thread. Codebooks are small and
// travel with the launch.

struct IqDeviceArgs : IqEncodeArgs {
    int32_t *bad;
};

inline int iq_device_args(const qf_array *in, int n_in, qf_array *out, int n_out, int64_t block, int64_t type_size, IqDeviceArgs *a) {
    if (n_out != 2 || out[1].ndim != 1 || out[1].shape[0] != 1) return QF_ESHAPE;
    if (out[1].dtype != QF_I32) return QF_EDTYPE;
    a->bad = (int32_t *)out[1].data;
    const int rc = iq_encode_args(in, n_in, 1, out, 1, block, type_size, a);
    if (rc != QF_OK) return rc;
    return aligned(a->w, 16) && aligned(a->q, 16) && aligned(a->out, 2) ? QF_OK : QF_ESHAPE;
}

template <class T>
__global__ void __launch_bounds__(WARP) encode_iq4_kernel(IqDeviceArgs a, const __grid_constant__ Iq4Values v) {
    constexpr int TEAM = T::GROUPS, TEAMS = WARP / TEAM;
    __shared__ Iq4Work work[TEAMS];
    __shared__ int32_t words[TEAMS][(T::BYTES + 3) / 4];
    const int team = (int)threadIdx.x / TEAM, group = (int)threadIdx.x % TEAM;
    const int64_t mine = (int64_t)blockIdx.x * TEAMS + team, b = mine < a.blocks ? mine : a.blocks - 1;
    const float *const w = a.w + b * T::BLOCK, *const importance = importance_of(a, b, T::BLOCK);
    check_finite(w, T::BLOCK, group, TEAM, a.bad);
    const float unit = inverse_power(largest<TEAM>(w, T::BLOCK));
    PerGroup<Iq4Chunk, TEAM> c;
    const Group<32> x(w + 32 * group);
    QF_UNROLL
    for (int i = 0; i < 32; i++) c[0].x[i] = x.x[i] * unit, c[0].q[i] = 1.0f;
    if (a.q) {
        const float scale = inverse_power(largest<TEAM>(importance, T::BLOCK));
        const Group<32> q(importance + 32 * group);
        QF_UNROLL
        for (int i = 0; i < 32; i++) c[0].q[i] = prepared(q.x[i], scale);
    }
    T::encode(v, c, set1(unit), words[team], work[team]);
    team_sync();
    if (mine != b) return;
    uint16_t *const to = (uint16_t *)(a.out + b * T::BYTES);
    EACH_OF_TEAM(TEAM, k, T::BYTES / 2) to[k] = ((const uint16_t *)words[team])[k];
}

template <class T> int encode_iq4(const qf_array *in, int n_in, qf_array *out, int n_out, [[maybe_unused]] void *stream) {
    IqDeviceArgs a;
    Iq4Values v;
    int rc = iq_device_args(in, n_in, out, n_out, T::BLOCK, T::BYTES, &a);
    if (rc == QF_OK) rc = iq4_values(in[2], &v);
    if (rc != QF_OK || !a.blocks) return rc;
    constexpr int TEAMS = WARP / T::GROUPS;
    return QF_LAUNCH(encode_iq4_kernel<T>, (unsigned)((a.blocks + TEAMS - 1) / TEAMS), WARP, stream, a, v);
}

template <class T> struct IqBook {
    typename T::Shape::Grid grid;
    typename T::Shape::Entries entries;
};

template <class T>
__global__ void __launch_bounds__(WARP) encode_iq_kernel(IqDeviceArgs a, const __grid_constant__ IqBook<T> book) {
    static_assert(sizeof(book.grid) % 4 == 0, "copied by words");
    __shared__ IqWork<T> work;
    __shared__ typename T::Shape::Grid grid;
    __shared__ int32_t bytes[(T::BYTES + 3) / 4];
    const int64_t b = blockIdx.x;
    const float *const w = a.w + 256 * b;
    EACH_OF_TEAM(WARP, i, (int)(sizeof grid / 4)) ((int32_t *)&grid)[i] = ((const int32_t *)&book.grid)[i];
    EACH_OF_TEAM(WARP, i, (T::BYTES + 3) / 4) bytes[i] = 0;
    check_finite(w, 256, (int)threadIdx.x, WARP, a.bad);
    team_sync();
    iq_encode_block<T>(grid, book.entries, w, importance_of(a, b, 256), (uint8_t *)bytes, work);
    team_sync();
    uint16_t *const to = (uint16_t *)(a.out + b * T::BYTES);
    EACH_OF_TEAM(WARP, i, T::BYTES / 2) to[i] = ((const uint16_t *)bytes)[i];
}

template <class T> int encode_iq(const qf_array *in, int n_in, qf_array *out, int n_out, [[maybe_unused]] void *stream) {
    IqDeviceArgs a;
    IqBook<T> book = {};
    int rc = iq_device_args(in, n_in, out, n_out, 256, T::BYTES, &a);
    if (rc == QF_OK) rc = iq_grid<typename T::Shape>(in[2], &book.grid, &book.entries);
    if (rc != QF_OK || !a.blocks) return rc;
    return QF_LAUNCH(encode_iq_kernel<T>, (unsigned)a.blocks, WARP, stream, a, book);
}

template <int ENTRIES, int VECTOR> struct IqDecodeTables {
    int8_t grid[ENTRIES * VECTOR];
    uint8_t ksigns[128];
};

template <int BLOCK, int TYPE_SIZE, int ENTRIES, int VECTOR, class Body>
__global__ void __launch_bounds__(128) iq_decode_kernel(DecodeArgs a, const __grid_constant__ IqDecodeTables<ENTRIES, VECTOR> tables, Body body) {
    const int64_t b = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (b < a.blocks) body(a.data + b * TYPE_SIZE, IqTables{tables.grid, tables.ksigns}, a.w + b * BLOCK);
}

template <int BLOCK, int TYPE_SIZE, int ENTRIES, int VECTOR, class Body>
inline int iq_decode(const qf_array *in, int n_in, qf_array *out, int n_out, [[maybe_unused]] void *stream, Body body) {
    DecodeArgs a;
    IqTables t;
    IqDecodeTables<ENTRIES, VECTOR> tables;
    const int rc = iq_decode_args(in, n_in, out, n_out, BLOCK, TYPE_SIZE, ENTRIES, VECTOR, &a, &t);
    if (rc != QF_OK || !a.blocks) return rc;
    memcpy(tables.grid, t.grid, sizeof tables.grid);
    memcpy(tables.ksigns, t.ksigns, sizeof tables.ksigns);
    return QF_LAUNCH((iq_decode_kernel<BLOCK, TYPE_SIZE, ENTRIES, VECTOR, Body>), (unsigned)((a.blocks + 127) / 128), 128, stream, a, tables, body);
}
