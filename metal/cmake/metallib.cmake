# Compiles the kernels ahead of time. The result is kept by the content of the sources, the options and the compiler,
# so an unchanged kernel is not compiled again, whatever the build folder.

set(ROPOOL_METAL_TARGET 14.0)

function(ropool_add_metallib)
  set(sources "${CMAKE_CURRENT_SOURCE_DIR}/kernels/rope_pool.metal" "${CMAKE_CURRENT_SOURCE_DIR}/kernels/params.h")
  set(options -std=metal3.1 -O3 -fno-fast-math -Wall -Wextra -mmacosx-version-min=${ROPOOL_METAL_TARGET})
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${sources})
  execute_process(COMMAND xcrun -sdk macosx metal --version OUTPUT_VARIABLE key ERROR_QUIET)
  string(APPEND key "${options}")
  foreach(source IN LISTS sources)
    file(READ "${source}" text)
    string(APPEND key "${text}")
  endforeach()
  string(SHA256 key "${key}")
  if(DEFINED ENV{XDG_CACHE_HOME})
    set(cache "$ENV{XDG_CACHE_HOME}/ropool/metallib")
  else()
    set(cache "$ENV{HOME}/.cache/ropool/metallib")
  endif()
  set(kept "${cache}/${key}.metallib")
  if(NOT EXISTS "${kept}")
    set(made "${CMAKE_CURRENT_BINARY_DIR}/ropool_metal.metallib")
    execute_process(COMMAND xcrun -sdk macosx metal ${options} -I "${CMAKE_CURRENT_SOURCE_DIR}/kernels"
                            "${CMAKE_CURRENT_SOURCE_DIR}/kernels/rope_pool.metal" -o "${made}"
                    COMMAND_ERROR_IS_FATAL ANY)
    file(MAKE_DIRECTORY "${cache}")
    # Renamed into place, so that two builds at once leave one whole file.
    file(COPY_FILE "${made}" "${kept}.partial")
    file(RENAME "${kept}.partial" "${kept}")
  endif()
  install(FILES "${kept}" DESTINATION ropool_metal RENAME ropool_metal.metallib)
endfunction()
