"""Tests of the Triton kernels: interpreted on the CPU, and as machine code for GPUs."""
