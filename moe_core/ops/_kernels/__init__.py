"""Private Triton kernels. Nothing here is imported before the first launch: `import moe_core.ops` needs no Triton."""
