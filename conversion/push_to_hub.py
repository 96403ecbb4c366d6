"""Run `hieratok push`."""

import sys

from hieratok_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
