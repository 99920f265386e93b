"""What a folder or file is called, however its path is written."""

from pathlib import Path


def name_of(given: str | Path) -> str:
    """The name of what is on the disk (`..`, `.` and links are followed); of anything else its last part."""
    path = Path(given).expanduser()
    return path.resolve().name if path.exists() else path.name
