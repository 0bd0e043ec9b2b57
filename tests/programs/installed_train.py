"""What pip installs as `fastpmae-train`: torchrun starts it by its path."""

import sys

from fastpmae.train import main

if __name__ == "__main__":
    sys.exit(main())
