"""What checking a checkpoint brings together: a line per check, notes, faults."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """What is wrong, and where: the name of a file in the folder, or of a tensor."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where} {self.what}"


@dataclass
class Verification:
    """What came of it: a line per check, things worth knowing that are no faults, and the faults.

    Attributes:
        elsewhere: how many of the faults are not the checkpoint's, but of what it was compared with.
    """

    directory: Path
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    elsewhere: int = 0

    def add(self, other: "Verification") -> None:
        """Go on with what another one found."""
        self.checks += other.checks
        self.notes += other.notes
        self.faults += other.faults

    def check(self, what: str, looked_at: str) -> None:
        self.checks.append(f"{what:<10} {looked_at}")

    def fault(self, where: str, what: str) -> None:
        self.faults.append(Fault(where, what))

    def compared_with_another(self, what: str) -> None:
        """The checkpoint was compared with something that it was not made from."""
        self.fault("comparison:", what)
        self.elsewhere += 1
