"""How far a long read has come: bytes, rate and time left. No clock of its own, no output."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """A reading of a load in progress; `str()` is one line for people."""

    total_bytes: int
    done_bytes: int = 0
    elapsed_s: float = 0.0

    def after(self, num_bytes: int, *, elapsed_s: float) -> "Progress":
        """The reading when so many more bytes have come, and so much time is over in all."""
        return replace(self, done_bytes=self.done_bytes + num_bytes, elapsed_s=elapsed_s)

    @property
    def bytes_per_s(self) -> float:
        """Mean rate so far; 0 before the first byte."""
        return self.done_bytes / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Time left at that rate; None while there is no rate."""
        if not self.bytes_per_s:
            return None
        return max(0, self.total_bytes - self.done_bytes) / self.bytes_per_s

    def __str__(self) -> str:
        """For instance "1.5 of 6.0 GB, 500 MB/s, 9 s left"."""
        text = f"{self.done_bytes / 1e9:.1f} of {self.total_bytes / 1e9:.1f} GB"
        if self.left_s is None:
            return text
        return f"{text}, {self.bytes_per_s / 1e6:.0f} MB/s, {self.left_s:.0f} s left"
