"""`python -m deltune` is the command `deltune`."""

from deltune.cli import main

if __name__ == "__main__":
    main()
