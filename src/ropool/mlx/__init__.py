"""Models of `mlx-lm` over ropool's pool: kernels, batched decoding, and the engine."""
