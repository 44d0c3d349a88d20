"""`ropool bench`: our kernels and what a user would otherwise run, timed side by side."""
