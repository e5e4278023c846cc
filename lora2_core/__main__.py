"""``python -m lora2_core``, from the pack's folder."""

import sys

from .cli import main

sys.exit(main())
