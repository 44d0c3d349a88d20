"""Tests of the five ops against the float64 oracle."""
