"""What a distillation does where nothing else is asked for; the command shows it without importing torch."""

SELF = "self"  # as data: text of the donor's own
TOKENS = 1_048_576
SEQUENCE_LENGTH = 512
STEPS_PER_LAYER = 500
BATCH_SIZE = 8  # sequences
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.0
MEMORY_LIMIT_GB = 4.0
LAYERS_PER_JOB = 4
