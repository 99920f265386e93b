"""The versions of transformers that this model was tested with; importing this module checks the installed one.

The model's files import this module first. Checkpoints hold copies of them, which any version of transformers may open.
"""

import transformers
from packaging.version import Version
from transformers.utils import logging

OLDEST, NEWEST = "5.16.1", "5.24.0"
TESTED = f"transformers {OLDEST} to {NEWEST}"

if Version(transformers.__version__) < Version(OLDEST):
    raise ImportError(
        f"This model needs {TESTED}; {transformers.__version__} is installed. Run: pip install 'transformers=={NEWEST}'"
    )
if Version(transformers.__version__) > Version(NEWEST):
    # transformers' own logger warns only once, even if many folders are opened.
    logging.get_logger().warning_once(
        f"This model was tested with {TESTED}; {transformers.__version__} is installed. "
        f"If its text looks wrong, run: pip install 'transformers=={NEWEST}'"
    )
