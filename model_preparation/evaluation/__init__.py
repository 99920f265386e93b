"""What a checkpoint is worth: the text it generates and the questions it answers."""
