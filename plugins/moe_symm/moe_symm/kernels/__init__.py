"""The plugin's Triton kernels."""
