"""Many builds, evaluations or searches at once: in turn, or on Ray."""
