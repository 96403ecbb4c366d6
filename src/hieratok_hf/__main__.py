"""Run the command `hieratok` as `python -m hieratok_hf`."""

import sys

from .cli.main import main

sys.exit(main())
