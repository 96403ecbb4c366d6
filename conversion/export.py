"""Run `hieratok export`."""

import sys

from hieratok_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
