"""Makes an environment with the oldest version of each library that pyproject.toml allows, for test_versions.sh.

The argument is the folder to make. Packages that need no older version, such as torch, come from the environment that
runs this script.
"""

import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement


def oldest(pyproject: Path) -> Iterator[str]:
    """`NAME==VERSION` of each dependency, with the oldest version of its range."""
    for text in tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]:
        requirement = Requirement(text)
        [version] = [clause.version for clause in requirement.specifier if clause.operator == ">="]
        extras = f"[{','.join(requirement.extras)}]" if requirement.extras else ""
        yield f"{requirement.name}{extras}=={version}"


def main() -> None:
    folder, here = Path(sys.argv[1]), sysconfig.get_path("purelib")
    venv.create(folder, clear=True, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "first_environment.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *oldest(Path(__file__).parents[1] / "pyproject.toml")], check=True)


if __name__ == "__main__":
    main()
