"""Run `hieratok convert detok`."""

import sys

from hieratok_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "detok", *sys.argv[1:]]))
