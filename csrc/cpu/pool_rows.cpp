#include "pool_rows.hpp"

#include <algorithm>
#include <cstring>

namespace ropool::cpu {
namespace {

bool multiple_of_line(std::int64_t value) { return value % 64 == 0; }

template <int size>
void scatter_elements(const Plane& plane, std::byte* dst, const std::byte* src, std::int64_t dim) {
    for (std::int64_t d = 0; d < dim; ++d) std::memcpy(dst + d * plane.dim_group_stride, src + d * size, size);
}

}  // namespace

std::int64_t size_of(DType dtype) {
    switch (dtype) {
        case DType::f32: return 4;
        case DType::f16:
        case DType::bf16: return 2;
        case DType::e4m3:
        case DType::e5m2: return 1;
        default: return 0;
    }
}

Divisor::Divisor(std::int64_t divisor)
    : divisor_(std::max<std::int64_t>(1, divisor)), inverse_(~std::uint64_t{0} / static_cast<std::uint64_t>(divisor_)) {}

RowOffsets::RowOffsets(const Plane& plane)
    : page_size_(plane.page_size), row_group_(plane.row_group), page_stride_(plane.page_stride),
      row_group_stride_(plane.row_group_stride), row_stride_(plane.row_stride) {}

bool streamable(const Plane& plane, const std::byte* base, std::int64_t dim) {
    return plane.dim_group >= dim && multiple_of_line(reinterpret_cast<std::intptr_t>(base)) &&
           multiple_of_line(dim * size_of(plane.dtype)) && multiple_of_line(plane.page_stride) &&
           multiple_of_line(plane.head_stride) && multiple_of_line(plane.row_group_stride) &&
           multiple_of_line(plane.row_stride);
}

void scatter(const Plane& plane, std::byte* dst, const std::byte* src, std::int64_t dim) {
    const std::int64_t size = size_of(plane.dtype);
    if (plane.dim_group > 1) {
        const std::int64_t group = plane.dim_group * size;
        const std::int64_t bytes = dim * size;
        for (std::int64_t at = 0; at < bytes; at += group, dst += plane.dim_group_stride) {
            if (group == 16) std::memcpy(dst, src + at, 16);
            else std::memcpy(dst, src + at, static_cast<std::size_t>(std::min(group, bytes - at)));
        }
    } else if (size == 4) {
        scatter_elements<4>(plane, dst, src, dim);
    } else if (size == 2) {
        scatter_elements<2>(plane, dst, src, dim);
    } else {
        scatter_elements<1>(plane, dst, src, dim);
    }
}

}  // namespace ropool::cpu
