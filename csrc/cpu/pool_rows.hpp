// Where the rows of a pool stand, and the copy into one whose dims are apart.
#pragma once

#include "types.hpp"

namespace ropool::cpu {

// Size of a storage type in bytes.
std::int64_t size_of(DType dtype);

// Division by a number known before the loop. The processor's own takes up to 90 cycles for 64 bits.
class Divisor {
public:
    // Numbers below 1 count as 1.
    explicit Divisor(std::int64_t divisor = 1);

    struct Parts {
        std::int64_t quotient;
        std::int64_t remainder;
    };

    // `value` is not negative.
    Parts divide(std::int64_t value) const {
        // The quotient or one less: `inverse_` is less than 2^64 / divisor_, by less than 1.
        const auto quotient = static_cast<std::int64_t>((static_cast<unsigned __int128>(value) * inverse_) >> 64);
        const std::int64_t remainder = value - quotient * divisor_;
        if (remainder < divisor_) return {quotient, remainder};
        return {quotient + 1, remainder - divisor_};
    }

private:
    std::int64_t divisor_;
    std::uint64_t inverse_;
};

// Bytes from the start of a plane to the first head of a slot.
class RowOffsets {
public:
    RowOffsets() = default;
    explicit RowOffsets(const Plane& plane);

    std::int64_t of(std::int64_t slot) const {
        const auto [page, row] = page_size_.divide(slot);
        const auto [group, in_group] = row_group_.divide(row);
        return page * page_stride_ + group * row_group_stride_ + in_group * row_stride_;
    }

private:
    Divisor page_size_;
    Divisor row_group_;
    std::int64_t page_stride_ = 0;
    std::int64_t row_group_stride_ = 0;
    std::int64_t row_stride_ = 0;
};

// Whether rows of `dim` dims consist of whole 64-byte lines that can be streamed to `plane` at `base`.
bool streamable(const Plane& plane, const std::byte* base, std::int64_t dim);

// One head's `dim` stored values into its dim groups.
void scatter(const Plane& plane, std::byte* dst, const std::byte* src, std::int64_t dim);

}  // namespace ropool::cpu
