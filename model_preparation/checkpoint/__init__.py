"""A checkpoint: planned, built, rebuilt, loaded, verified, inspected and described."""
