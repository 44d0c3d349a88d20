// How a launch of one extension is started by another without Python between them: the attribute `native` of a launch
// is a capsule of this name around this table.
#pragma once

namespace ropool {

inline constexpr const char* kNativeLaunch = "ropool.native_launch";

struct NativeLaunch {
    enum Result : int {
        done = 0,
        refused = 1,  // nothing was done: calling the launch object says why
        failed = -1,  // a Python error is set
    };
    // `addresses`: of the op's tensors in their order, null where one is absent or has no memory. Called with the
    // interpreter lock held.
    Result (*run)(const void* self, void* const* addresses);
    const void* self;  // lives as long as the launch object
};

}  // namespace ropool
