"""Many builds or evaluations at once, in turn or on a Ray cluster, and the table of what became of them."""
