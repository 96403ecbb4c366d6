"""Run `hieratok app`, as a Hugging Face Space does."""

import sys

from hieratok_hf.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["app", *sys.argv[1:]]))
