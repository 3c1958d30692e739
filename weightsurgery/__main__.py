"""`python -m weightsurgery` is `wsurg`."""

from weightsurgery.cli import main

if __name__ == "__main__":
    main()
