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

    def __repr__(self) -> str:
        """For instance "expert 3 of layer 0", or "slice 1 of 2 of expert 3 of layer 0"."""
        part = f"slice {self.slice_number} of {self.num_slices} of " if self.num_slices > 1 else ""
        return f"{part}expert {self.expert_id} of layer {self.layer}"

    def bounds(self, intermediate_size: int) -> tuple[int, int]:
        """Where the unit's run of the intermediate dimension begins and ends."""
        number, count = self.slice_number, self.num_slices
        assert 0 <= number < count <= intermediate_size, self
        return number * intermediate_size // count, (number + 1) * intermediate_size // count
