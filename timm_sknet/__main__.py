"""Runs the command `timm-sknet` as `python -m timm_sknet`."""

import sys

from timm_sknet.cli import main

if __name__ == '__main__':
    sys.exit(main())
