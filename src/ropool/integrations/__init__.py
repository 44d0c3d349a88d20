"""Where ropool meets model libraries and serving engines."""
