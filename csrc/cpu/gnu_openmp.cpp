#include "gnu_openmp.hpp"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>

namespace ropool::cpu {
namespace {

int collect(dl_phdr_info* info, std::size_t, void* found) {
    const char* path = info->dlpi_name;
    const char* slash = path == nullptr ? nullptr : std::strrchr(path, '/');
    if (slash == nullptr || std::strncmp(slash + 1, "libgomp", 7) != 0) return 0;
    *static_cast<std::string*>(found) = path;
    return std::strstr(path, "/torch/") != nullptr;  // 1 ends the walk
}

TeamFn find() {
    std::string path;
    dl_iterate_phdr(collect, &path);
    if (path.empty()) return nullptr;
    void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<TeamFn>(dlsym(library, "GOMP_parallel"));
}

}  // namespace

TeamFn gnu_openmp_team() {
    static const TeamFn team = find();
    return team;
}

}  // namespace ropool::cpu
#else
namespace ropool::cpu {
TeamFn gnu_openmp_team() { return nullptr; }
}  // namespace ropool::cpu
#endif
