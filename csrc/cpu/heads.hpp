// The heads of one token: read, RMS-norm, rotate, scale, round once, write.
//
// One call is one thread's work; the token loop (run.cpp) lays tokens and groups of heads over threads. An iteration
// holds both elements of each of its pairs (neox: two vectors, or two bfloat16 blocks, half a rotation apart) before it
// stores anything, so that a head may be rotated in place. With the norm a head is read twice, the second time from the
// first-level cache. Byte floor: each head read once and written once; cos and sin once a token.
#pragma once

#include "vec.hpp"

namespace ropool::cpu {
namespace {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// One head. `In` = bfloat16 goes in blocks (load_block) as far as they reach, the rest by whole and part vectors.
template <class In, class Out, bool Interleaved, bool Norm>
struct Head {
    static constexpr bool blocks = kSame<In, BF16> && (Out::scaled || kSame<Out, BF16>);

    const std::byte* const src;
    std::byte* const dst;
    const std::byte* const cos_row;
    const std::byte* const sin_row;
    const std::byte* const weight;
    const std::int64_t dim;
    const std::int64_t rotary_dim;
    const std::int64_t ahead;
    const Vec scale;
    Vec inverse_rms;

    // Whole: a full vector; otherwise its first n lanes.
    template <class T, bool Whole>
    ROPOOL_INLINE Vec read(const std::byte* p, std::int64_t i, int n) {
        if constexpr (Whole) return load<T>(p, i);
        else return load_part<T>(p, i, n);
    }

    // May point past the tensor: asking for a line reads nothing and never faults.
    inline __attribute__((always_inline)) void announce(std::int64_t i) const {
        __builtin_prefetch(src + i * In::size + ahead, 1);
    }

    template <bool Whole>
    inline __attribute__((always_inline)) Vec input(std::int64_t i, int n) const {
        announce(i);
        const Vec x = read<In, Whole>(src, i, n);
        if constexpr (Norm) return x * inverse_rms * read<F32, Whole>(weight, i, n);
        else return x;
    }

    template <bool Whole>
    inline __attribute__((always_inline)) void output(std::int64_t i, Vec v, int n) const {
        if constexpr (Out::scaled) v = v / scale;
        if constexpr (Whole) store<Out>(dst, i, v);
        else store_part<Out>(dst, i, v, n);
    }

    inline __attribute__((always_inline)) Two input_block(std::int64_t i) const {
        announce(i);
        const Two x = load_block(src, i);
        if constexpr (!Norm) return x;
        const Two w = deinterleave(load<F32>(weight, i), load<F32>(weight, i + kWidth));
        return {x.even * inverse_rms * w.even, x.odd * inverse_rms * w.odd};
    }

    inline __attribute__((always_inline)) void output_block(std::int64_t i, Two v) const {
        if constexpr (Out::scaled) v = {v.even / scale, v.odd / scale};
        store_block<Out>(dst, i, v);
    }

    // `i` counts elements of a half (neox) or of the whole rotary part (interleaved), as the table's rows do.
    template <bool Whole>
    inline __attribute__((always_inline)) void rotate(std::int64_t i, int n) const {
        const Vec cos = read<F32, Whole>(cos_row, i, n);
        const Vec sin = read<F32, Whole>(sin_row, i, n);
        const Vec first = input<Whole>(i, n);
        if constexpr (Interleaved) {
            output<Whole>(i, first * cos + swap_pairs(first) * sin, n);
        } else {
            const std::int64_t half = rotary_dim / 2;
            const Vec second = input<Whole>(half + i, n);
            output<Whole>(i, first * cos - second * sin, n);
            output<Whole>(half + i, second * cos + first * sin, n);
        }
    }

    inline __attribute__((always_inline)) void rotate_block(std::int64_t i) const {
        const Vec cos = load<F32>(cos_row, i);
        const Vec sin = load<F32>(sin_row, i);
        const Two first = input_block(i);
        if constexpr (Interleaved) {
            output_block(i, {first.even * cos - first.odd * sin, first.odd * cos + first.even * sin});
        } else {
            const Vec odd_cos = load<F32>(cos_row, i + kWidth);
            const Vec odd_sin = load<F32>(sin_row, i + kWidth);
            const std::int64_t half = rotary_dim / 2;
            const Two second = input_block(half + i);
            output_block(i, {first.even * cos - second.even * sin, first.odd * odd_cos - second.odd * odd_sin});
            output_block(half + i, {second.even * cos + first.even * sin, second.odd * odd_cos + first.odd * odd_sin});
        }
    }

    inline __attribute__((always_inline)) float mean_square() const {
        Vec total = {};
        std::int64_t i = 0;
        if constexpr (blocks) {
            for (; i + kBlock <= dim; i += kBlock) {
                const Two x = load_block(src, i);
                total += x.even * x.even;
                total += x.odd * x.odd;
            }
        }
        for (; i + kWidth <= dim; i += kWidth) {
            const Vec x = load<In>(src, i);
            total += x * x;
        }
        if (i < dim) {
            const Vec x = load_part<In>(src, i, static_cast<int>(dim - i));
            total += x * x;
        }
        return sum(total) / static_cast<float>(dim);
    }

    inline __attribute__((always_inline)) void rotary_part() const {
        const std::int64_t end = Interleaved ? rotary_dim : rotary_dim / 2;
        std::int64_t i = 0;
        if constexpr (blocks) {
            for (; i + kBlock <= end; i += kBlock) rotate_block(i);
        }
        for (; i + kWidth <= end; i += kWidth) rotate<true>(i, kWidth);
        if (i < end) rotate<false>(i, static_cast<int>(end - i));
    }

    inline __attribute__((always_inline)) void passed_part() const {
        std::int64_t i = rotary_dim;
        if constexpr (kSame<In, Out> && !Norm) {
            // Not through float32, which would change the bits of a NaN.
            if (i < dim && src != dst) __builtin_memcpy(dst + i * Out::size, src + i * In::size, (dim - i) * In::size);
            return;
        }
        if constexpr (blocks) {
            for (; i + kBlock <= dim; i += kBlock) output_block(i, input_block(i));
        }
        for (; i + kWidth <= dim; i += kWidth) output<true>(i, input<true>(i, kWidth), kWidth);
        if (i < dim) {
            const int n = static_cast<int>(dim - i);
            output<false>(i, input<false>(i, n), n);
        }
    }
};

template <class In, class Out, bool Interleaved, bool Norm>
void heads(const Heads& job) {
    const Heads call = job;  // of its own: a store to `dst` may change `job` for all that the compiler knows
    for (std::int64_t h = 0; h < call.heads; ++h) {
        float scale = 1.0F;
        if (Out::scaled && call.scale != nullptr) {
            __builtin_memcpy(&scale, call.scale + h * call.scale_stride, sizeof(scale));
        }
        Head<In, Out, Interleaved, Norm> head = {
            call.src + h * call.src_stride, call.dst + h * call.dst_stride, bytes(call.cos), bytes(call.sin),
            bytes(call.weight), call.dim, call.rotary_dim, call.ahead, broadcast(scale), Vec{}};
        if constexpr (Norm) head.inverse_rms = broadcast(1.0F / __builtin_sqrtf(head.mean_square() + call.eps));
        head.rotary_part();
        head.passed_part();
    }
}

template <class In, class Out>
HeadsFn heads_of(bool interleaved, bool norm) {
    if (interleaved) return norm ? heads<In, Out, true, true> : heads<In, Out, true, false>;
    return norm ? heads<In, Out, false, true> : heads<In, Out, false, false>;
}

template <class In>
HeadsFn heads_from(DType out, bool interleaved, bool norm) {
    switch (out) {
        case DType::f32: return heads_of<In, F32>(interleaved, norm);
        case DType::f16: return heads_of<In, F16>(interleaved, norm);
        case DType::bf16: return heads_of<In, BF16>(interleaved, norm);
        case DType::e4m3: return heads_of<In, E4M3>(interleaved, norm);
        case DType::e5m2: return heads_of<In, E5M2>(interleaved, norm);
        default: return nullptr;
    }
}

HeadsFn select_heads(DType in, DType out, bool interleaved, bool norm) {
    switch (in) {
        case DType::f32: return heads_from<F32>(out, interleaved, norm);
        case DType::f16: return heads_from<F16>(out, interleaved, norm);
        case DType::bf16: return heads_from<BF16>(out, interleaved, norm);
        default: return nullptr;
    }
}

}  // namespace
}  // namespace ropool::cpu
