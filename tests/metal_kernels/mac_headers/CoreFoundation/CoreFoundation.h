// The names that metal-cpp takes from this header, for a compiler without Apple's SDK. Nothing here is ever linked.
#pragma once
typedef double CFTimeInterval;
typedef const void* CFTypeRef;
