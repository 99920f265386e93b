"""Upload a checkpoint. Run build_checkpoint.py first, and set MODELSCOPE_API_TOKEN to a token that may write.

python share_checkpoint.py my-org/my-checkpoint
"""

import sys

from model_preparation import share_checkpoint

page = share_checkpoint("example_output/checkpoint", repo=sys.argv[1], licence="apache-2.0", private=True)
print(f"Checkpoint is at {page}")
