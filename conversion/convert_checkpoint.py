"""Run `hieratok convert checkpoint`."""

import sys

from hieratok_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "checkpoint", *sys.argv[1:]]))
