// Causal attention in bf16 on a CPU with AMX, forward and backward, in tiles that stay in a core's cache.
//
// Scores are stored transposed: one row a key, one column a query. Softmax then works on vectors of queries, and writes
// weights in the layout of a product's right side (two rows interleaved, "VNNI"), so no tile of them is transposed:
//
//     forward     S = K Q'                    P = exp(S - m)              O' += V' P
//     backward    S = K Q'    G = V dO'       P = exp(S - lse)            dV += P dO    dK += D Q    dQ' += K' D
//                                             D = P (G - sum of O dO)
//
// Query i of a row sees the keys up to first + i. Tiles are filled with zeros beyond the last query or key. A hash of the
// seed, the row and head, the key and the query decides whether a weight is dropped, so the backward pass drops the same
// weights as the forward pass.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = at::BFloat16;

constexpr int64_t TILE = 128;  // queries and keys of a tile
constexpr float LOG2E = 1.44269504f;
constexpr float LEAST = -1e30f;  // below any score

}  // namespace

extern "C" {

struct Heads {  // (rows, heads, places, channels); channels are contiguous
    bf16* data;
    int64_t row, head, place;  // strides
};

struct Attention {  // the same fields as in amx_attention.py
    Heads q, k, v, out, grad_out, grad_q, grad_k, grad_v;
    float* lse;            // (rows, heads, queries) binary logarithms of the normalizers
    const int64_t* first;  // (rows,)
    int64_t rows, heads, queries, keys, channels;
    float scale;
    float dropout;
    int64_t seed;
};

}  // extern "C"

namespace {

using Pair = uint32_t;  // the values of two rows in one column

uint32_t rounded(float x) {  // to bf16, half to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

float exp2_of(float x) {  // for x up to 1; relative error 3e-6; NaN stays NaN
    x = x < -126.f ? -126.f : x;
    const float whole = std::floor(x + 0.5f), f = x - whole;
    float y = 1 + f * (0.693147182f + f * (0.240226507f + f * (0.0555041087f + f * (0.00961812911f + f * 0.00133335581f))));
    int32_t bits;
    std::memcpy(&bits, &y, sizeof bits);
    bits += static_cast<int32_t>(static_cast<uint32_t>(static_cast<int32_t>(whole)) << 23);
    std::memcpy(&y, &bits, sizeof bits);
    return y;
}

uint32_t hashed(uint32_t x) {  // a permutation with little bias (C. Wellons, hash-prospector)
    x ^= x >> 16;
    x *= 0x21f0aaadu;
    x ^= x >> 15;
    x *= 0xd35a2d97u;
    return x ^ x >> 15;
}

// Factor of a weight: 0, or 1 over the share that is kept.
struct Dropout {
    uint32_t limit;
    float keep;

    float operator()(uint32_t key_word, uint32_t query) const {
        return hashed(key_word + query * 0x9e3779b9u) < limit ? 0.f : keep;
    }
};

void multiply(
    int64_t m, int64_t n, int64_t k, const bf16* a, int64_t a_stride, const Pair* b, int64_t b_stride, float* c,
    int64_t c_stride, bool add) {
    at::native::cpublas::brgemm(m, n, k, a_stride, b_stride, c_stride, add, a, reinterpret_cast<const bf16*>(b), c);
}

// One row's head.
class Head {
   public:
    Head(const Attention& all, int64_t index)
        : all(all), row(index / all.heads), head(index % all.heads), D(all.channels), N(all.queries), M(all.keys),
          padded((N + TILE - 1) / TILE * TILE), first(all.first[row]), lse(all.lse + index * N),
          factor(all.scale * LOG2E), dropout{static_cast<uint32_t>(all.dropout * 4294967296.0), 1 / (1 - all.dropout)} {
        const auto seed = static_cast<uint64_t>(all.seed);
        word = hashed(hashed(static_cast<uint32_t>(seed)) ^ static_cast<uint32_t>(seed >> 32));
        word = hashed(word + static_cast<uint32_t>(index));
    }

    template <bool DROPS>
    void forward() {
        const float factor = this->factor;
        const Dropout dropped = dropout;
        const auto queries = pairs_of_channels(all.q);
        std::vector<float> greatest(padded, LEAST), sum(padded), out(D * padded), scores(TILE * TILE);
        float best[TILE], shrink[TILE];
        std::vector<bf16> keys(TILE * D), values(D * TILE);
        std::vector<Pair> weights(TILE / 2 * TILE);
        for (int64_t j = 0; j < M && j <= first + N - 1; j += TILE) {
            copy_tile(all.k, j, keys.data());
            transpose_tile(all.v, j, values.data());
            for (int64_t i = first_tile(j); i < N; i += TILE) {
                multiply(TILE, TILE, D, keys.data(), D, &queries[i], padded, scores.data(), TILE, false);
                float *m = &greatest[i], *l = &sum[i];
                std::fill(best, best + TILE, LEAST);
                for (int64_t x = 0; x < TILE; ++x) {
                    const float* s = &scores[x * TILE];
#pragma GCC ivdep
                    for (int32_t c = first_query(i, j + x); c < TILE; ++c) best[c] = s[c] > best[c] ? s[c] : best[c];
                }
#pragma GCC ivdep
                for (int32_t c = 0; c < TILE; ++c) {
                    const float score = best[c] * factor, more = score > m[c] ? score : m[c];
                    shrink[c] = exp2_of(m[c] - more);
                    l[c] *= shrink[c];
                    m[c] = more;
                }
                for (int64_t x = 0; x < TILE; x += 2) {
                    const int32_t from[] = {first_query(i, j + x), first_query(i, j + x + 1)};
                    const uint32_t words[] = {word_of(j + x), word_of(j + x + 1)}, query = i;
                    const float *a = &scores[x * TILE], *b = a + TILE;
                    Pair* w = &weights[x / 2 * TILE];
#pragma GCC ivdep
                    for (int32_t c = 0; c < TILE; ++c) {
                        float p = exp2_of(a[c] * factor - m[c]), q = exp2_of(b[c] * factor - m[c]);
                        p = c >= from[0] ? p : 0.f;
                        q = c >= from[1] ? q : 0.f;
                        l[c] += p + q;
                        if constexpr (DROPS) {
                            p *= dropped(words[0], query + c);
                            q *= dropped(words[1], query + c);
                        }
                        w[c] = rounded(p) | rounded(q) << 16;
                    }
                }
                if (j > 0 && std::any_of(shrink, shrink + TILE, [](float x) { return x != 1; }))
                    for (int64_t d = 0; d < D; ++d) {
                        float* o = &out[d * padded + i];
#pragma GCC ivdep
                        for (int32_t c = 0; c < TILE; ++c) o[c] *= shrink[c];
                    }
                multiply(D, TILE, TILE, values.data(), TILE, weights.data(), TILE, &out[i], padded, true);
            }
        }
        for (int64_t i = 0; i < N; ++i) {
            lse[i] = greatest[i] + std::log2(sum[i]);
            sum[i] = 1 / sum[i];
        }
        for (int64_t i = 0; i < N; ++i)
            for (int64_t d = 0; d < D; ++d) at(all.out, i)[d] = bf16(out[d * padded + i] * sum[i]);
    }

    template <bool DROPS>
    void backward() {
        const float factor = this->factor;
        const Dropout dropped = dropout;
        const auto queries = pairs_of_channels(all.q), grads = pairs_of_channels(all.grad_out);
        const auto queries_below = pairs_of_places(all.q), grads_below = pairs_of_places(all.grad_out);
        std::vector<float> norm(padded), inner(padded), grad_q(D * padded);
        for (int64_t i = 0; i < N; ++i) {
            norm[i] = lse[i];
            const bf16 *a = at(all.out, i), *b = at(all.grad_out, i);
            for (int64_t d = 0; d < D; ++d) inner[i] += static_cast<float>(a[d]) * static_cast<float>(b[d]);
        }
        std::vector<float> scores(TILE * TILE), slopes(TILE * TILE), grad_k(TILE * D), grad_v(TILE * D);
        std::vector<bf16> keys(TILE * D), values(TILE * D), keys_across(D * TILE);
        std::vector<uint16_t> weights(TILE * TILE), changes(TILE * TILE);
        std::vector<Pair> changes_paired(TILE / 2 * TILE);
        for (int64_t j = 0; j < M; j += TILE) {
            copy_tile(all.k, j, keys.data());
            copy_tile(all.v, j, values.data());
            transpose_tile(all.k, j, keys_across.data());
            std::fill(grad_k.begin(), grad_k.end(), 0.f);
            std::fill(grad_v.begin(), grad_v.end(), 0.f);
            for (int64_t i = first_tile(j); i < N; i += TILE) {
                multiply(TILE, TILE, D, keys.data(), D, &queries[i], padded, scores.data(), TILE, false);
                multiply(TILE, TILE, D, values.data(), D, &grads[i], padded, slopes.data(), TILE, false);
                const float *lse_i = &norm[i], *inner_i = &inner[i];
                for (int64_t x = 0; x < TILE; x += 2) {
                    const int32_t from[] = {first_query(i, j + x), first_query(i, j + x + 1)};
                    const uint32_t words[] = {word_of(j + x), word_of(j + x + 1)}, query = i;
                    const float *s = &scores[x * TILE], *t = s + TILE, *g = &slopes[x * TILE], *h = g + TILE;
                    uint16_t *w = &weights[x * TILE], *v = w + TILE, *e = &changes[x * TILE], *f = e + TILE;
                    Pair* pair = &changes_paired[x / 2 * TILE];
#pragma GCC ivdep
                    for (int32_t c = 0; c < TILE; ++c) {
                        float p = exp2_of(s[c] * factor - lse_i[c]), q = exp2_of(t[c] * factor - lse_i[c]);
                        p = c >= from[0] ? p : 0.f;
                        q = c >= from[1] ? q : 0.f;
                        float keep_p = 1, keep_q = 1;
                        if constexpr (DROPS) {
                            keep_p = dropped(words[0], query + c);
                            keep_q = dropped(words[1], query + c);
                        }
                        w[c] = rounded(p * keep_p);
                        v[c] = rounded(q * keep_q);
                        const uint32_t change_p = rounded(p * (g[c] * keep_p - inner_i[c]));
                        const uint32_t change_q = rounded(q * (h[c] * keep_q - inner_i[c]));
                        e[c] = change_p;
                        f[c] = change_q;
                        pair[c] = change_p | change_q << 16;
                    }
                }
                const auto* p = reinterpret_cast<bf16*>(weights.data());
                const auto* changed = reinterpret_cast<bf16*>(changes.data());
                multiply(TILE, D, TILE, p, TILE, &grads_below[i / 2 * D], D, grad_v.data(), D, true);
                multiply(TILE, D, TILE, changed, TILE, &queries_below[i / 2 * D], D, grad_k.data(), D, true);
                multiply(D, TILE, TILE, keys_across.data(), TILE, changes_paired.data(), TILE, &grad_q[i], padded, true);
            }
            for (int64_t x = 0; x < std::min(TILE, M - j); ++x)
                for (int64_t d = 0; d < D; ++d) {
                    at(all.grad_k, j + x)[d] = bf16(grad_k[x * D + d] * all.scale);
                    at(all.grad_v, j + x)[d] = bf16(grad_v[x * D + d]);
                }
        }
        for (int64_t i = 0; i < N; ++i)
            for (int64_t d = 0; d < D; ++d) at(all.grad_q, i)[d] = bf16(grad_q[d * padded + i] * all.scale);
    }

   private:
    bf16* at(const Heads& x, int64_t place) const {
        return x.data + row * x.row + head * x.head + place * x.place;
    }

    // The first tile of queries in which a query sees key j.
    int64_t first_tile(int64_t j) const { return std::max<int64_t>(j - first, 0) / TILE * TILE; }

    // The first column of a tile that sees a key; TILE if none does.
    int32_t first_query(int64_t i, int64_t key) const {
        return key < M ? std::clamp<int64_t>(key - first - i, 0, TILE) : TILE;
    }

    uint32_t word_of(int64_t key) const { return hashed(word + static_cast<uint32_t>(key)); }

    // One column a query; row d holds the channels 2d and 2d + 1.
    std::vector<Pair> pairs_of_channels(const Heads& x) const {
        std::vector<Pair> pairs(D / 2 * padded);
        for (int64_t i = 0; i < N; ++i) {
            const auto* from = reinterpret_cast<const Pair*>(at(x, i));
            for (int64_t d = 0; d < D / 2; ++d) pairs[d * padded + i] = from[d];
        }
        return pairs;
    }

    // One column a channel; row i holds the places 2i and 2i + 1.
    std::vector<Pair> pairs_of_places(const Heads& x) const {
        std::vector<Pair> pairs(padded / 2 * D);
        for (int64_t i = 0; i < N; ++i) {
            const auto* from = reinterpret_cast<const uint16_t*>(at(x, i));
            for (int64_t d = 0; d < D; ++d) pairs[i / 2 * D + d] |= static_cast<Pair>(from[d]) << (i % 2 * 16);
        }
        return pairs;
    }

    void copy_tile(const Heads& x, int64_t j, bf16* to) const {
        const int64_t count = std::min(TILE, M - j);
        for (int64_t y = 0; y < count; ++y) std::memcpy(to + y * D, at(x, j + y), D * sizeof(bf16));
        std::fill(to + count * D, to + TILE * D, bf16(0.f));
    }

    void transpose_tile(const Heads& x, int64_t j, bf16* to) const {
        const int64_t count = std::min(TILE, M - j);
        if (count < TILE) std::fill(to, to + D * TILE, bf16(0.f));
        for (int64_t y = 0; y < count; ++y)
            for (int64_t d = 0; d < D; ++d) to[d * TILE + y] = at(x, j + y)[d];
    }

    const Attention& all;
    const int64_t row, head, D, N, M, padded, first;
    float* const lse;
    const float factor;  // from products to scores in base 2
    const Dropout dropout;
    uint32_t word;
};

template <typename Work>
void each_head(const Attention& all, const Work& work) {
    at::parallel_for(0, all.rows * all.heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) work(Head(all, index));
        at::native::cpublas::brgemm_release();
    });
}

}  // namespace

extern "C" void attention_forward(const Attention* all) {
    each_head(*all, [&](Head head) { all->dropout > 0 ? head.forward<true>() : head.forward<false>(); });
}

extern "C" void attention_backward(const Attention* all) {
    each_head(*all, [&](Head head) { all->dropout > 0 ? head.backward<true>() : head.backward<false>(); });
}
