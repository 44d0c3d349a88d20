"""The versions that belong together, readable without loading the extension."""

__version__ = "0.1.0"
MLX_VERSION = "0.32.4"
