"""Local folders for names and hub ids; uploads of checkpoints; licences."""
