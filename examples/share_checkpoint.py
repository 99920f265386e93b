"""Upload a checkpoint. Run build_checkpoint.py first, and set MODELSCOPE_API_TOKEN to a token that may write.

python examples/share_checkpoint.py my-org/my-checkpoint
"""

import argparse

from model_preparation import share_checkpoint

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("repo", help="the repository to upload to, such as my-org/my-checkpoint")
repo = parser.parse_args().repo
page = share_checkpoint("example_output/checkpoint", repo=repo, licence="apache-2.0", private=True)
print(f"Checkpoint is at {page}")
