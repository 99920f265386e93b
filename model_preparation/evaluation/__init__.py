"""What a checkpoint is worth: text it generates, questions it answers, tables of both."""
