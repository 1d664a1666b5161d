"""Kernels that only this plugin needs."""
