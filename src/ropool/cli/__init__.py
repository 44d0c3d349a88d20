"""The `ropool` command."""
