"""See what killed builds left behind. Run build_checkpoint.py first."""

from model_preparation import clean_checkpoints

cleaned = clean_checkpoints("example_output", dry_run=True)
print(f"{len(cleaned.abandoned)} folders and {len(cleaned.paths)} files could be removed")
