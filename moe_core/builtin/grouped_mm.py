"""What `torch.nn.functional.grouped_mm` asks of its operands."""

GROUPED_MM_ALIGNMENT = 8
"""Elements of bf16: strides and the address in multiples of 16 bytes."""
