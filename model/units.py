"""What a worker holds: an expert of a layer, or a slice of one. Knows no torch."""

from typing import NamedTuple


class Unit(NamedTuple):
    """Slice number `slice_number` of `num_slices` of an expert; a whole expert is 0 of 1.

    A slice takes an equal run of the intermediate dimension: rows of w1 and w3, columns of w2. So
    the slices' outputs add up to the expert's.
    """

    layer: int
    expert_id: int
    slice_number: int = 0
    num_slices: int = 1
