"""Dispatch for moe-core by NIXL EP: one copy of a row per chosen expert, over NVLink or RDMA."""

__version__ = "0.1.0"
