"""Programmatic dependent launch in Gluon kernels, which Triton's own functions are not for."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def wait_for_kernel_before():
    """Behind it everything that the kernel before has written is there."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.u32 $0, 0;", "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def let_next_kernel_come():
    """Once all programs have been here, the next kernel's may come beside them."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip
