"""Flags that several verbs of the command line take."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        help="Checkpoint folder or Hugging Face Hub id; the embedded tiny one if left out.",
    ),
]
Experts = Annotated[
    str | None, typer.Option("--experts", help="Quantise experts: nf4, nf4-double, int8 or int4.")
]
AttentionWeights = Annotated[
    str | None, typer.Option("--attention-weights", help="Quantise attention's matrices: the same.")
]
DType = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; the checkpoint's own.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show logs and full traces.")]
