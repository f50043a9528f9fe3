"""``python -m fasc``."""

from fasc.cli.app import main

if __name__ == "__main__":
    main()
