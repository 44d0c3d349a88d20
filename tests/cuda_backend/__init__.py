"""Tests of the CUDA backend's own parts; its results are tested with those of every backend."""
