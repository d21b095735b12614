"""Without a GPU, kernels run in Triton's interpreter: chosen when triton is first imported, so before anything else."""

import contextlib
import os

import torch

if not torch.cuda.is_available():
    chosen = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # without triton, tests/kernels is skipped
        import triton.experimental.gluon  # noqa: F401  (the interpreter imports it late)

        import tedcompile.kernels.experts
        import tedcompile.kernels.gradients
        import tedcompile.kernels.losses  # noqa: F401
    del os.environ["TRITON_INTERPRET"]  # not for the processes that tests start
    if chosen is not None:
        os.environ["TRITON_INTERPRET"] = chosen
